"""docs/ops/drop-in.md: its code runs and gives what it says."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tests.peers import suites, truth
from tests.sources import ROOT

TEXT = (ROOT / "docs" / "ops" / "drop-in.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
TRL, SFT, GRPO, GKD = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("diff", DIFFS)
def test_one_import_changes(diff: str) -> None:
    """And both import the same names."""
    before, after = (
        "\n".join(line[1:] for line in diff.splitlines() if line[0] == sign) for sign in "-+"
    )
    module, names = re.fullmatch(r"from (\S+) import (.*)", before).groups()
    scope: dict = {}
    exec(after, scope)
    assert {name for name in scope if name != "__builtins__"} == set(names.split(", "))
    if module.startswith("torch"):
        library = importlib.import_module(module)
        if hasattr(library, names):
            assert getattr(library, names) is not scope[names]


def _problem() -> tuple:
    """hidden [2, 5, 8], head [13, 8], labels [2, 5] of which some are ignored."""
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(13, (2, 5))
    labels[:, 1] = -100
    return hidden, head, labels


def _run(code: str, name: str):
    scope: dict = {}
    exec(code, scope)
    return scope[name]


def _assert_same(ours, plain, *leaves) -> None:
    torch.testing.assert_close(ours, plain)
    pairs = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, plain))
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b)


def test_sft() -> None:
    hidden, head, labels = _problem()
    z = F.linear(hidden[:, :-1], head).flatten(0, 1)
    options = {"lse_square_scale": 1e-4, "label_smoothing": 0.1}
    plain = truth.with_z_loss(z, labels[:, 1:].flatten(), **options)[0]
    _assert_same(_run(SFT, "sft_loss")(hidden, head, labels), plain, hidden, head)


def test_grpo() -> None:
    hidden, head, labels = _problem()
    old, advantage = -torch.rand(2, 5) * 3, torch.randn(2, 1)
    arguments = (labels, old, advantage, 0.7, 0.01)
    log_p = (F.linear(hidden, head) / 0.7).log_softmax(-1)
    ratio = (log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - old).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    entropy, counted = -(log_p.exp() * log_p).sum(-1), labels != -100
    plain = -((objective + 0.01 * entropy) * counted).sum() / counted.sum()
    _assert_same(_run(GRPO, "grpo_loss")(hidden, head, *arguments), plain, hidden, head)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_gkd(beta: float) -> None:
    hidden, head, labels = _problem()
    teacher = torch.randn(2, 5, 6), torch.randn(13, 6)
    z, teacher_z = (F.linear(*x).flatten(0, 1) for x in ((hidden, head), teacher))
    plain = truth.generalized_jsd(z, teacher_z, labels.flatten(), beta, 0.7, -100)
    loss = _run(GKD, "gkd_loss")(hidden, head, *teacher, labels, beta, 0.7)
    _assert_same(loss, plain, hidden, head)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_our_head_in_place_of_trls(temperature: float) -> None:
    """Each field that both give, and gradients of every parameter."""
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    ids = torch.randint(61, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    plain = model(input_ids=ids).logits
    wanted = ("log_probs", "entropy", "is_top1")
    utils.add_fused_lm_head(model, temperature=temperature, outputs=wanted)
    results = []
    for ours in (False, True):
        if ours:
            _run(TRL, "fuse_head")(model, temperature)
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([out.loss, *(out[name] for name in wanted), out.label_mask, *gradients])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float())
    torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_the_table_counts_the_cases() -> None:
    """docs/ops/peers.md is what `python -m tests.peers` printed."""
    page = (ROOT / "docs" / "ops" / "peers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    counts = Counter(case.suite for case in suites.cases())
    absent = Counter()
    for row in suites.ABSENT:
        absent[row.suite] += row.cases
    expected = {suite: (counts[suite], absent[suite]) for suite in counts}
    expected["all"] = (counts.total(), absent.total())
    assert {suite: (int(n), int(left)) for suite, n, _, left in rows} == expected
    assert all(n == passed for _, n, passed, _ in rows)
