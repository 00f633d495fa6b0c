"""Weights of rows (W1) and gates: every term, its gradients and its counts."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from groundkern.hf import (
    DvSft,
    GroundingTrainer,
    Hist,
    Klal,
    LogitLens,
    PatchText,
    attach,
    gate,
    row_counts,
)
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.data.weights import GROUPS
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.conftest import MODELS
from tests.hf.methods import METHODS
from tests.hf.naive import naive_forward, run_samples
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, make_batch, weighted

WEIGHTS = [f"gk_{group}_weight" for group in GROUPS]
FEW = SAMPLES["qwen"][:2]
WEIGHTED = {  # BASIC has no rows
    kind: {name: how for name, how in methods.items() if name != "basic"}
    for kind, methods in METHODS.items()
}
KINDS = ["attention", pytest.param("gradcam", marks=pytest.mark.long)]


def double(batch: dict) -> dict:
    return {k: x.double() if k == "pixel_values" else x for k, x in batch.items()}


def counts_of(batch: dict) -> dict[str, int]:
    return dict(zip(COUNTS, row_counts(batch).tolist(), strict=True))


def test_weighted_terms_equal_the_naive_forward_in_fp64(qwen, terms):
    qwen.double()
    batch = double(make_batch(qwen, weighted(SAMPLES["qwen"]), side="left"))
    assert all(bool((batch[name] == 0.0).any()) for name in WEIGHTS)
    naive = naive_forward(qwen, batch, **terms)
    wanted = gradients(qwen, naive.loss)
    ours = attach(qwen, **terms).train()(**batch)
    assert_same_losses(ours, naive)
    assert_same_gradients(gradients(qwen, ours.loss), wanted, share=1e-5)


def test_words_are_averaged_over_images_and_visual_tokens_by_hand(qwen):
    """Sample 0: an image with words of weights 0.5, 2, 0; sample 1: two images, 3 and 0.

    "image": (1 / 2) * ((0.5 a + 2 b) / 2 + 3 c / 1), since the third image has no row that counts.
    """
    batch = make_batch(qwen, FEW)
    batch["gk_word_weight"] = torch.tensor([[0.5, 2.0, 0.0], [3.0, 0.0, 0.0]])
    counts = counts_of(batch)
    assert counts["labelled_image"] == 2
    assert counts["word"] == 3
    first, second = (s.word_losses(s.log_probs(s.main), 0.3) for s in run_samples(qwen, batch))
    weighed = 0.5 * first[0] + 2.0 * first[1]
    wanted = {
        "image": (weighed / 2 + 3.0 * second[0]) / 2,
        "labelled": (weighed + 3.0 * second[0]) / 3,
        "visual": (weighed + 3.0 * second[0]) / counts["visual"],
    }
    for average, loss in wanted.items():
        part = attach(qwen, dv_sft=DvSft(average=average)).train()(**batch).parts["word"]
        torch.testing.assert_close(part, loss.detach(), rtol=1e-5, atol=0)


def test_phrases_composites_and_concepts_by_hand(qwen):
    """A composite counts as its whole; one with a part of weight 0 is gone, its phrases are not."""
    batch = make_batch(qwen, SAMPLES["qwen"])
    numbers, weight = batch["gk_phrase_number"], torch.tensor([2.0, 0.0, 0.5, 3.0])
    batch["gk_phrase_weight"] = weight[numbers.clamp(min=0).long()]
    batch["gk_lens_weight"] = torch.tensor([0.5, 0.0, 2.0, 3.0]).expand(4, 4).clone()
    plain = {name: x for name, x in batch.items() if name not in WEIGHTS}
    attach(qwen, hist=Hist(), logit_lens=LogitLens())
    ours = qwen.train()(**batch).parts
    counts = counts_of(batch)
    # (2; 0, 1) of samples 0 and 1, and (2; 1, 3) of sample 1: each has phrase 1, of weight 0
    assert counts["composite"] == 0
    assert float(ours["composition"]) == 0.0
    batch["gk_phrase_weight"] = torch.tensor([2.0, 1.0, 0.5, 0.0])[numbers.clamp(min=0).long()]
    alone = {**plain, "gk_phrase_composite": plain["gk_phrase_composite"].clone()}
    alone["gk_phrase_composite"][1, 1] = -1  # the one with phrase 3
    assert counts_of(batch)["composite"] == 2
    found, wanted = qwen(**batch).parts, qwen(**alone).parts
    torch.testing.assert_close(found["composition"], 0.5 * wanted["composition"])
    raised, suppressed, phrases, subjects = [], [], [], []
    for b, sample in enumerate(run_samples(qwen, batch)):
        log_probs = sample.log_probs(sample.main)
        rows = (batch[f"gk_lens_{x}"][b].tolist() for x in ("label", "inside", "weight"))
        for i, label, inside, w in zip(sample.positions("lens"), *rows):
            p = log_probs[i, label]
            (raised if inside else suppressed).append(-w * (p if inside else torch.log1p(-p.exp())))
        rows = (batch[f"gk_phrase_{x}"][b].tolist() for x in ("subject", "weight"))
        for i, subject, w in zip(sample.positions("phrase"), *rows):
            loss = -w * log_probs[i, sample.ids[i + 1]]
            phrases.append(loss)
            subjects += [loss] * subject
    counts = counts_of(batch)
    means = {"lens_raise": (raised, "raise"), "lens_suppress": (suppressed, "suppress")}
    means |= {"phrase": (phrases, "phrase"), "subject": (subjects, "subject")}
    for name, (losses, count) in means.items():
        assert counts[count] == sum(bool(x != 0) for x in losses), name
        mean = sum(losses).detach() / counts[count]
        torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=0)


def test_the_divergence_of_ease_by_hand(qwen):
    """KL(model || target) of one layer's head mean over the image, of the rows that a gate left."""
    batch = make_batch(qwen, weighted(SAMPLES["qwen"]))
    batch["gk_map_target"] += (batch["gk_map_target"] >= 0) * 1000  # a floor
    batch = gate(batch, [True, True, False, False])
    losses = []
    for b, sample in enumerate(run_samples(qwen, batch)):
        columns = [c - sample.first for c in batch["gk_map_columns"][b].tolist() if c >= 0]
        for r, t in enumerate(sample.positions("map")):
            own = [int(sample.image[c]) == int(batch["gk_map_image"][b, r]) for c in columns]
            q = sample.layers[2][0].mean(0)[t, columns][own].double()
            p = batch["gk_map_target"][b, r, : len(columns)][own].double()
            q, p = q / q.sum(), p / p.sum()
            weight = float(batch["gk_map_weight"][b, r])
            losses += [weight * (q * (q / p).log()).sum().detach()] if weight else []
    assert len(losses) == 3  # of 4; the fourth sample's is gated
    ease = Klal(weight=1e-3, divergence="reverse_kl", over="renormalised", layers=(2,))
    ours = attach(qwen, klal=ease).train()(**batch)
    torch.testing.assert_close(ours.parts["map_kl"].double(), sum(losses) / 3, rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", METHODS)
def test_the_loss_is_linear_in_the_weights(kind):
    """With the same rows and totals L(v + w) - L(0) = L(v) + L(w) - 2 L(0), gradients alike: a
    weight of 2 is twice the gradient of 1."""
    methods = {**WEIGHTED[kind], "patch_text": PatchText()}  # its words count alike
    model = attach(MODELS["qwen"](attention="eager"), **methods).train()
    batch = make_batch(model, FEW)
    generator = torch.Generator().manual_seed(0)
    draws = [
        {name: 0.2 + torch.rand(batch[name].shape, generator=generator) for name in WEIGHTS}
        for _ in range(2)
    ]
    numbers = batch["gk_phrase_number"].clamp(min=0).long()  # one weight for all rows of a phrase
    for draw in draws:
        draw["gk_phrase_weight"] = draw["gk_phrase_weight"].gather(1, numbers)
    both = {name: draws[0][name] + draws[1][name] for name in WEIGHTS}
    totals = row_counts(batch)
    losses, found = [], []
    for weights in (*draws, both):
        output = model(**{**batch, **weights}, gk_totals=totals)
        losses.append(output.loss.detach() - output.parts["text"])
        found.append(gradients(model, output.loss))
    text = gradients(model, model(**batch, gk_totals=totals, gk_part="text").loss)
    torch.testing.assert_close(losses[2], losses[0] + losses[1], rtol=1e-5, atol=0)
    first, second, whole = found
    added = {name: first[name] + second[name] - text.get(name, 0.0) for name in whole}
    assert_same_gradients(added, whole, share=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_are_as_if_they_were_not_there(kind):
    """Weights (1, 0) are the batch without the second sample's rows, and all 0 the text alone, to
    the bit and without NaN."""
    model = attach(MODELS["qwen"](attention="eager"), **WEIGHTED[kind]).train()
    batch = make_batch(model, FEW)
    bare = {**batch}
    for group in (*GROUPS, "several"):
        for name in (name for name in batch if name.startswith(f"gk_{group}_")):
            if name not in ("gk_map_columns", "gk_side_inside"):
                bare[name] = batch[name].clone()
                bare[name][1] = 0 if name in WEIGHTS else -1
    gated = gate(batch, [True, False])
    assert torch.equal(row_counts(gated), row_counts(bare))
    ours, wanted = model(**gated), model(**bare)
    assert torch.equal(ours.loss, wanted.loss)
    assert all(torch.equal(part, wanted.parts[name]) for name, part in ours.parts.items())
    found, expected = gradients(model, ours.loss), gradients(model, wanted.loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    none = model(**gate(batch, torch.zeros(2)))
    assert torch.equal(none.loss.detach(), none.parts["text"])
    assert not any(bool(part) for name, part in none.parts.items() if name != "text")
    text = gradients(model, model(**batch, gk_part="text").loss)
    for name, gradient in gradients(model, none.loss).items():
        wanted = text.get(name, torch.zeros_like(gradient))  # the text has no learned head weights
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_weights_of_one_change_no_bit(qwen):
    """Left out or given: the same loss and gradients."""
    model = attach(qwen, **METHODS["attention"]).train()
    batch = make_batch(model, FEW)
    without = {name: x for name, x in batch.items() if name not in WEIGHTS}
    outputs = [model(**each) for each in (batch, without)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    first, second = (gradients(model, output.loss) for output in outputs)
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


def test_weights_are_exact_under_accumulation_packing_and_checkpointing():
    model = attach(MODELS["qwen"](), **METHODS["attention"]).train()
    samples = weighted(SAMPLES["qwen"])
    whole = model(**make_batch(model, samples))
    wanted, count = gradients(model, whole.loss), row_counts(make_batch(model, samples))
    packed = [packed_batch(model, [samples[:2]]), packed_batch(model, [samples[2:]])]
    assert torch.equal(sum(map(row_counts, packed)), count)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = dict.fromkeys(whole.parts, 0.0)
    for batch in packed:
        output = model(**batch, gk_totals=count)
        output.loss.backward()
        parts = {name: parts[name] + part for name, part in output.parts.items()}
    for name, part in whole.parts.items():
        torch.testing.assert_close(parts[name], part, rtol=1e-5, atol=0)
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, wanted, share=2e-5)


def test_weights_in_fewer_bits_are_taken(qwen):
    """Frameworks cast the floats of a batch; these weights have as few digits as bf16."""
    batch = make_batch(qwen, weighted(FEW))
    attach(qwen, klal=Klal()).train()
    half = {name: x.bfloat16() if name in WEIGHTS else x for name, x in batch.items()}
    assert torch.equal(qwen(**half).loss, qwen(**batch).loss)


def test_a_gate_multiplies_the_weights_of_its_samples(qwen):
    samples = weighted(FEW)
    padded, packed = make_batch(qwen, samples), packed_batch(qwen, [samples])
    before = {name: x.clone() for name, x in padded.items()}
    gated = gate(padded, [0.5, 2.0])
    assert all(torch.equal(x, before[name]) for name, x in padded.items())  # pure
    for name in WEIGHTS:
        assert torch.equal(gated[name], before[name] * torch.tensor([[0.5], [2.0]])), name
    unchanged = padded.keys() - set(WEIGHTS)
    assert all(gated[name] is padded[name] for name in unchanged)
    by_document = gate(packed, [[0.5, 2.0, 7.0]])  # nothing has a third document
    for name in WEIGHTS:
        rows = [row[row > 0].tolist() for row in (*gated[name], *by_document[name])]
        assert rows[0] + rows[1] == rows[2], name
    without = {name: x for name, x in padded.items() if name not in WEIGHTS}
    assert gate(without, [0.0, 3.0])["gk_map_weight"].tolist() == [[0.0, 0.0], [3.0, 3.0]]
    bare = {"input_ids": padded["input_ids"]}
    assert gate(bare, [1, 1]).keys() == bare.keys()


@pytest.mark.parametrize(
    ("keep", "packed", "wanted"),
    [
        ([1.0], False, r"`keep`: expected the shape \[2\], got \[1\]"),
        ([[1.0, 1.0]], False, r"`keep`: expected the shape \[2\]"),
        ([1.0, -1.0], False, "`keep`: expected finite numbers >= 0"),
        ([1.0, float("nan")], False, "`keep`: expected finite numbers >= 0"),
        ([1.0], True, r"expected the shape \[1, documents of a row\]"),
        ([[1.0]], True, "`keep`: expected 2 documents, as many as a row has, got 1"),
    ],
)
def test_gates_that_do_not_fit_are_refused(qwen, keep, packed, wanted):
    batch = packed_batch(qwen, [FEW]) if packed else make_batch(qwen, FEW)
    with pytest.raises(ValueError, match=wanted):
        gate(batch, keep)


def test_a_trainer_hands_on_weights_that_nothing_rounds(qwen, tmp_path):
    """As under FSDP or DeepSpeed, every float of the batch is cast to bf16 on its way."""
    batch = make_batch(qwen, FEW)
    batch["gk_map_weight"] = torch.tensor([[1 / 3, 0.0], [0.7, 1e-3]])
    attach(qwen, klal=Klal()).train()
    exact, rounded = qwen(**batch).loss, {**batch}
    rounded["gk_map_weight"] = batch["gk_map_weight"].bfloat16()
    assert not torch.equal(qwen(**rounded).loss, exact)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = GroundingTrainer(qwen, args, examine=False)

    def cast(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        small = {k: x.bfloat16() for k, x in kwargs.items() if k.endswith("_weight")}
        return args, {**kwargs, **{k: x for k, x in small.items() if "several" not in k}}

    handle = qwen.register_forward_pre_hook(cast, with_kwargs=True)
    assert torch.equal(trainer.compute_loss(qwen, batch), exact)
    handle.remove()
