"""The main pass's log-sum-exp reaches the side pass, and nothing else comes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern import asked
from groundkern.hf import Klal, Smam, attach, detach
from groundkern.hf.model import attention
from groundkern.hf.model.body_run import SHIFT_FROM, BodyRun
from groundkern.hf.model.layer import SideRows
from tests.hf.closeness import gradients
from tests.hf.conftest import MODELS
from tests.hf.samples import SAMPLES, make_batch


class Counted:
    """Counts the calls of an op that came with an lse."""

    def __init__(self, monkeypatch, module, name: str) -> None:
        self.given, self.calls = 0, 0
        op = getattr(module, name)

        def counted(*arguments, **options):
            self.calls += 1
            self.given += options.get("lse") is not None
            return op(*arguments, **options)

        monkeypatch.setattr(module, name, counted)


def always(*_) -> bool:
    """In place of `BodyRun.shifts`."""
    return True


def _run(model, batch: dict) -> tuple[torch.Tensor, dict]:
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


def test_one_call_is_checked_for_all_layers(monkeypatch) -> None:
    """Layers differ in the numbers of their tensors alone, with an lse too."""
    model = attach(
        tiny_qwen_model(num_hidden_layers=6), smam=Smam(), klal=Klal(over="visible")
    ).train()
    side = Counted(monkeypatch, asked, "side_attention")
    maps = Counted(monkeypatch, asked, "attention_kl")
    _run(model, make_batch(model, SAMPLES["qwen"][1:2]))
    detach(model)
    assert (side.calls, side.given) == (maps.calls, maps.given) == (1, 1)


@pytest.mark.parametrize(
    ("one", "checkpointed"), [(False, False), (True, True)], ids=["padded", "one sample"]
)
def test_statistics_are_used_and_change_nothing(
    model, samples, one: bool, checkpointed: bool, monkeypatch
) -> None:
    """It may always shift the side pass, and is a normaliser only if the main pass has no mask."""
    monkeypatch.setattr(BodyRun, "shifts", always)
    attach(model, smam=Smam(), klal=Klal(over="visible")).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, samples[1:2] if one else samples)
    side = Counted(monkeypatch, asked, "side_attention")
    maps = Counted(monkeypatch, asked, "attention_kl")
    with_lse = _run(model, batch)
    assert side.given == side.calls > 0
    assert maps.given == (maps.calls if one else 0) and maps.calls > 0
    monkeypatch.setattr(attention.Watch, "lse", lambda self, q: None)
    monkeypatch.setattr(attention, "lse_of_graph", lambda out, q: None)
    side.given = 0
    without = _run(model, batch)
    assert side.given == 0
    torch.testing.assert_close(with_lse[0], without[0], rtol=1e-6, atol=1e-6)
    largest = max(float(g.abs().max()) for g in without[1].values())
    for name, gradient in with_lse[1].items():
        size = float(without[1][name].abs().max())  # of a key's bias: 0 but for rounding
        assert float((gradient - without[1][name]).abs().max()) <= 1e-5 * size + 1e-6 * largest


def test_eager_attention_has_none_to_give(samples, family, monkeypatch) -> None:
    monkeypatch.setattr(BodyRun, "shifts", always)
    model = attach(MODELS[family](attention="eager"), smam=Smam()).train()
    side = Counted(monkeypatch, asked, "side_attention")
    _run(model, make_batch(model, samples))
    assert side.calls > 0 and side.given == 0


def test_nothing_is_looked_for_that_saves_less_than_it_costs(monkeypatch) -> None:
    """Only long bf16 keys of the Triton kernel are worth it; a normaliser is worth it to maps."""
    model = attach(tiny_qwen_model(), smam=Smam()).train()
    batch = make_batch(model, SAMPLES["qwen"][1:2])
    side = Counted(monkeypatch, asked, "side_attention")
    with monkeypatch.context() as patched:
        patched.setattr(attention, "lse_of_graph", None)
        patched.setattr(attention, "Watch", None)
        _run(model, batch)
    assert side.calls > 0 and side.given == 0
    detach(model)
    by = {name: SimpleNamespace(join=join) for name, join in (("triton", print), ("native", None))}
    rows = SideRows(SimpleNamespace(), None)

    def of(kernels: str, length: int, dtype: torch.dtype, side: SideRows | None = rows) -> bool:
        return BodyRun(length, "auto", [], side=side).shifts(by[kernels], dtype)

    assert of("triton", SHIFT_FROM, torch.bfloat16)
    assert not of("triton", SHIFT_FROM - 1, torch.bfloat16)
    assert not of("native", SHIFT_FROM, torch.bfloat16)
    assert not of("triton", SHIFT_FROM, torch.float16)
    assert not of("triton", SHIFT_FROM, torch.bfloat16, None), "no side tokens"
