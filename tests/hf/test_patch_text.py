"""Patch-text contrast: a model's logits of a few words, written out; rows; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundkern.hf import PatchText, attach, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.model.head import word_logits
from groundkern.hf.model.logit_rule import LogitRule
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch


def contrast_only(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if name != "gk_text_position"}


def written_out(model, batch: dict, how: PatchText) -> tuple[torch.Tensor, torch.Tensor]:
    """(B4) row by row, (B5) word by word."""
    rows, found = [], []
    for b, sample in enumerate(run_samples(model, batch)):
        logits = model.lm_head(sample.main) / how.temperature  # [S, V]
        positions = sample.positions("contrast")
        labels = [[w for w in row if w >= 0] for row in batch["gk_contrast_label"][b].tolist()]
        said = dict(zip(positions, labels))
        for number, words in enumerate(batch["gk_contrast_bag"][b].tolist()):
            words = [w for w in words if w >= 0]
            patches = (sample.image == number).nonzero()[:, 0].tolist()
            for i in [i for i in positions if i in patches]:
                log_p = logits[i, words].log_softmax(0)
                own = [log_p[words.index(w)] for w in said[i]]
                rows.append(-sum(own) / len(own))
            for w in words:
                log_p = logits[patches, w].log_softmax(0)
                on = [log_p[n] for n, i in enumerate(patches) if w in said.get(i, ())]
                found.append(-sum(on) / len(on))
    return torch.stack(rows), torch.stack(found)


def test_loss_and_gradients_are_those_written_out(model, family, samples):
    batch = make_batch(model, samples, side="left" if family == "qwen" else "right")
    how = PatchText(weight=0.5, words=3.0, temperature=2.0)
    attach(model, patch_text=how).train()
    ours = model(**contrast_only(batch))
    found = gradients(model, ours.loss)
    rows, words = written_out(model, batch, how)
    assert (len(rows), len(words)) == (7, 7)
    counts = dict(zip(COUNTS, row_counts(batch).tolist(), strict=True))
    assert (counts["contrast"], counts["contrast_word"]) == (7, 7)
    torch.testing.assert_close(ours.parts["patch_text"], rows.mean().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.parts["text_patch"], words.mean().detach(), rtol=1e-5, atol=0)
    wanted = gradients(model, 0.5 * rows.mean() + 3.0 * words.mean())
    assert_same_gradients({k: found[k] for k in wanted}, wanted, share=2e-4)


def test_two_words_by_hand():
    """h = (1, 0), U = log 3 ((1, 0), (0, 1), (7, 7)): exp of the logits of words 0 and 1 is 3 and
    1, whatever word 2 has."""
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(3.0).log() * torch.tensor([[1.0, 0], [0, 1], [7, 7]]))
    hidden, words = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0, 1, -1]])
    logits = word_logits(head, hidden, words, LogitRule(1.0, None))
    torch.testing.assert_close(logits[0, 0, :2].softmax(0), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("rule", [LogitRule(1.0, 2.0), LogitRule(1.0, None, torch.arange(9.0))])
def test_a_plain_head_and_any_other_agree(rule):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, 9)
    hidden = torch.randn(2, 3, 5, generator=generator)
    words = torch.tensor([[3, 8, -1], [0, 0, 5]])
    wanted = rule.of(head(hidden)).gather(2, words.clamp(min=0)[:, None].expand(2, 3, 3))
    torch.testing.assert_close(word_logits(head, hidden, words, rule), wanted)
    torch.testing.assert_close(word_logits(nn.Sequential(head), hidden, words, rule), wanted)


def test_a_batch_without_words_has_no_loss(qwen):
    attach(qwen, patch_text=PatchText(words=1.0)).train()
    output = qwen(**contrast_only(make_batch(qwen, SAMPLES["qwen"][2:4])))
    assert float(output.parts["patch_text"]) == float(output.parts["text_patch"]) == 0.0
    assert not any(g.any() for g in gradients(qwen, output.loss).values())


def test_rows_that_say_no_word_of_their_image_are_refused(qwen):
    attach(qwen, patch_text=PatchText()).train()
    batch = make_batch(qwen, SAMPLES["qwen"][:1])
    bad = dict(batch, gk_contrast_label=batch["gk_contrast_label"] + 5)
    with pytest.raises(ValueError, match="`gk_contrast_label`: expected words of gk_contrast_bag"):
        qwen(**bad)
    bad = dict(batch, gk_contrast_position=torch.zeros_like(batch["gk_contrast_position"]))
    with pytest.raises(ValueError, match="`gk_contrast_position`: expected visual tokens"):
        qwen(**bad)
    with pytest.raises(ValueError, match="`temperature`: expected a number above 0"):
        PatchText(temperature=0.0)
