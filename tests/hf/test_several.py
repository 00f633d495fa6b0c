"""Several labels on one visual token (D5): the head, a whole model, the collator, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundkern.hf import DvSft, Word, attach, row_counts
from groundkern.hf.model.head import Several, score_rows, soft_targets
from groundkern.hf.model.logit_rule import LogitRule
from groundkern.hf.objectives import Objectives
from groundkern.hf.watching.held_out import HeldOutMeans
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.collating import live, make_collator, make_example
from tests.hf.naive import naive_forward
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.test_head import OtherLinear, rows

SEVERAL = Several(
    torch.tensor(
        [[3, 4, 1], [7, 3, -1], [3, 5, -1], [-1, -1, -1], [0, 12, 7], *[[-1] * 3] * 3, [9, 2, 11]]
    ),
    torch.tensor(
        [[1, 3, 2], [2, 2, -1], [1, 1, -1], [-1, -1, -1], [5, 1, 1], *[[-1] * 3] * 3, [1, 1, 1]]
    ),
)


def naive_rows(head, hidden, target, smoothing, several, softcap):
    """(D5) label by label."""
    losses = []
    for n, x in enumerate(hidden):
        z = head(x)
        p = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)
        pairs = zip(several.ids[n].tolist(), several.weight[n].tolist(), strict=True)
        own = {y: w for y, w in pairs if y >= 0} or {int(target[n]): 1}
        image = int(smoothing.index[n])
        bag = [] if image < 0 else smoothing.ids[image].tolist()
        others = [y for y in bag if y >= 0 and y not in own]
        loss = -sum(w * p[y] for y, w in own.items()) / sum(own.values())
        if others:
            spread = -sum(p[y] for y in others) / len(others)
            loss = (1 - smoothing.share) * loss + smoothing.share * spread
        losses.append(0.0 * loss if target[n] == -100 else loss)
    return torch.stack(losses)


@pytest.mark.parametrize("kind", [nn.Linear, OtherLinear])
@pytest.mark.parametrize(("softcap", "share"), [(None, 0.3), (2.0, 0.9), (None, 0.0)])
def test_rows_equal_the_naive_ones(kind, softcap, share):
    hidden, target, smoothing, upstream = rows()
    smoothing = smoothing._replace(share=share)
    torch.manual_seed(3)
    head = kind(6, 13)
    x = hidden.clone().requires_grad_()
    wanted = naive_rows(head, x, target, smoothing, SEVERAL, softcap)
    inputs = (x, *head.parameters())
    expected = torch.autograd.grad((wanted * upstream).sum(), inputs)
    rule = LogitRule(1.0, softcap)
    options = {"smoothing": smoothing, "several": SEVERAL, "rule": rule, "backend": "auto"}
    scores = score_rows(head, x, target, **options)
    torch.testing.assert_close(scores.loss, wanted, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((scores.loss * upstream).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    alone = score_rows(head, x, target, **{**options, "several": None})
    torch.testing.assert_close(scores.log_prob, alone.log_prob, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.predicted, alone.predicted)
    for n in (5, 6, 7):  # one label each
        torch.testing.assert_close(scores.loss[n], alone.loss[n], rtol=1e-6, atol=0)


def test_the_probabilities_of_a_row_sum_to_one():
    _, target, smoothing, _ = rows()
    found = soft_targets(target, smoothing, SEVERAL)
    sums = found.probabilities.sum(1)
    torch.testing.assert_close(sums, (target != -100).float(), rtol=1e-6, atol=0)
    assert (found.ids[2] == -100).all()
    assert (found.ids[0] == 3).sum() == (found.ids[0] == 4).sum() == 1  # not of the bag again


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_equals_the_naive_forward(model, samples, terms, side):
    batch = make_batch(model, samples, side=side)
    count = batch["gk_word_label"].shape[1]
    generator = torch.Generator().manual_seed(0)
    several = torch.randint(61, 300, (len(samples), count, 3), generator=generator)
    several[..., 0] = batch["gk_word_label"]
    several[:, ::2, 2] = -1
    several[:, 1::3] = -1  # one label only
    several[batch["gk_word_position"] < 0] = -1
    batch["gk_several_label"] = several
    weights = torch.randint(1, 9, several.shape, generator=generator).int()
    batch["gk_several_weight"] = weights.where(several >= 0, -1)
    terms |= {"dv_sft": DvSft(weight=0.5)}
    naive = naive_forward(model, batch, **terms)
    wanted = gradients(model, naive.loss)
    ours = attach(model, **terms)(**batch)
    assert_same_losses(ours, naive)
    assert_same_gradients(gradients(model, ours.loss), wanted, share=1e-4)
    without = {k: x for k, x in batch.items() if not k.startswith("gk_several")}
    assert float(model(**without).parts["word"]) != float(ours.parts["word"])
    torch.testing.assert_close(model(**without).word_log_prob, ours.word_log_prob)
    assert torch.equal(row_counts(batch), row_counts(without))


def test_any_of_the_labels_is_right_in_held_out_figures(qwen):
    model, batch = attach(qwen, dv_sft=DvSft()).eval(), make_batch(qwen, SAMPLES["qwen"])
    with torch.no_grad():
        said = model(**batch).word_predicted
    rows = batch["gk_word_position"] >= 0
    first = torch.where(rows, (said + 1) % 300, -1)
    batch["gk_word_label"] = first
    batch["gk_several_label"] = torch.stack((first, torch.where(rows, said, -1)), -1)
    batch["gk_several_label"][0] = -1  # one label, which is wrong
    batch["gk_several_weight"] = torch.where(batch["gk_several_label"] >= 0, 1, -1).int()
    means = HeldOutMeans(Objectives(dv_sft=DvSft()), torch.device("cpu"))
    with torch.no_grad():
        means.add(batch, model(**batch))
    wanted = float(rows[1:].sum() / rows.sum())
    assert 0 < wanted < 1
    assert means.means()["word_accuracy"] == pytest.approx(wanted)


def test_a_label_without_a_weight_is_refused(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    batch["gk_several_label"] = batch["gk_word_label"][..., None]
    batch["gk_several_weight"] = torch.zeros_like(batch["gk_several_label"]).int()
    with pytest.raises(ValueError, match="`gk_several_weight`: expected a number above 0"):
        attach(qwen)(**batch)
    del batch["gk_several_weight"]
    with pytest.raises(ValueError, match="`gk_several_weight`: expected a tensor"):
        qwen(**batch)


def test_a_number_labels_its_visual_token_with_all_its_digits():
    """The tiny tokenizer has a token for each digit that it did not merge."""
    collator = make_collator()
    tokenizer = collator.processor.tokenizer
    box, other = (0, 0, 0.1, 0.1), (0.5, 0.5, 0.6, 0.6)
    batch = collator([make_example(words=(Word("€7,377.0", box, 0), Word("red", other, 0)))])
    ids = tokenizer(" 7,377.0", add_special_tokens=False)["input_ids"]
    digits = [i for i in ids if any(map(str.isdigit, tokenizer.decode([i])))]
    shown = {i: sum(map(str.isdigit, tokenizer.decode([i]))) for i in digits}
    wanted = {i: shown[i] * digits.count(i) for i in dict.fromkeys(digits)}
    assert len(wanted) > 1
    found = batch["gk_several_label"][0, 0].tolist()
    assert dict(zip(found, batch["gk_several_weight"][0, 0].tolist(), strict=True)) == wanted
    assert sum(wanted.values()) == 5
    assert batch["gk_several_label"][0, 1].unique().tolist() == [-1]
    assert batch["gk_word_label"][0, 0] == found[0]
    red = int(batch["gk_word_label"][0, 1])
    assert set(live(batch["gk_word_bag"][0, 0])) == {*wanted, red}


@pytest.mark.parametrize("policy", ["first", "last"])
def test_one_token_of_a_number(policy):
    collator = make_collator(number_label=policy)
    batch = collator([make_example(words=(Word("12.9%", (0, 0, 0.1, 0.1), 0),))])
    label = collator.processor.tokenizer.decode(live(batch["gk_word_label"][0]))
    assert label.strip() == {"first": "1", "last": "9"}[policy]
    assert batch["gk_several_label"].shape == (1, 1, 0)
    assert collator.counts["words_useless_digit"] == 1


def test_numbers_can_be_dropped():
    collator = make_collator(number_label="drop")
    words = (Word("12", (0, 0, 0.1, 0.1), 0), Word("2nd", (0.3, 0, 0.4, 0.1), 0))
    batch = collator([make_example(words=words)])
    assert collator.counts["words_dropped_number"] == 2
    assert batch["gk_word_label"].shape == (1, 0)


def test_words_on_one_visual_token_share_it():
    words = (Word("grid", (0, 0, 0.15, 0.1), 0), Word("(row)", (0.1, 0.1, 0.12, 0.12), 0))
    collator = make_collator(on_shared_token="several")
    batch = collator([make_example(words=words)])
    convert = collator.processor.tokenizer.convert_ids_to_tokens
    assert convert(batch["gk_several_label"][0, 0].tolist()) == ["Ġgrid", "Ġrow"]
    assert batch["gk_several_weight"].tolist() == [[[4, 3]]]
    assert convert(live(batch["gk_word_label"][0])) == ["Ġgrid"]
    assert collator.counts["words_shared_token"] == 0
    assert collator.counts["word_rows"] == 1
    with pytest.raises(ValueError, match="`number_label`: expected 'several' or 'first'"):
        make_collator(number_label="all")
