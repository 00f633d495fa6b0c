"""The grounded forward against the naive one: values, gradients, padding, what it records."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from groundkern.hf import DvSft, GroundedOutput, Klal, Smam, attach, detach, row_counts
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.conftest import MODELS
from tests.hf.naive import naive_forward
from tests.hf.rows import plain_inputs, rows_of
from tests.hf.samples import SAMPLES, make_batch

VARIANTS = {
    "visible keys, each head": {"klal": Klal(over="visible", heads="each")},
    "columns, each head": {"klal": Klal(heads="each", layers=(0, 2))},
    "visible keys, last layer": {"klal": Klal(over="visible", layers=(2,))},
    "detached reference, no smoothing": {
        "smam": Smam(detach_reference=True, beta=0.9),
        "dv_sft": DvSft(weight=0.3, smoothing=0.0),
    },
}


def assert_same_output(ours: GroundedOutput, naive, batch: dict) -> None:
    assert_same_losses(ours, naive)
    text = ours.text_log_prob[batch["gk_text_position"] >= 0]
    torch.testing.assert_close(text, torch.stack(naive.text_log_prob), rtol=1e-5, atol=1e-5)
    side = ours.side_log_prob[batch["gk_side_position"] >= 0]
    torch.testing.assert_close(side, torch.stack(naive.side_log_prob), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_naive_forward(model, samples, terms, side):
    batch = make_batch(model, samples, side=side)
    naive = naive_forward(model, batch, **terms)
    wanted = gradients(model, naive.loss)
    ours = attach(model, **terms)(**batch)
    assert_same_output(ours, naive, batch)
    assert_same_gradients(gradients(model, ours.loss), wanted, share=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_options_equal_the_naive_forward(qwen, terms, variant):
    terms |= VARIANTS[variant]
    batch = make_batch(qwen, SAMPLES["qwen"])
    naive = naive_forward(qwen, batch, **terms)
    wanted = gradients(qwen, naive.loss)
    ours = attach(qwen, **terms)(**batch)
    assert_same_output(ours, naive, batch)
    assert_same_gradients(gradients(qwen, ours.loss), wanted, share=1e-4)


def test_eager_and_sdpa_agree(family, samples, terms):
    outputs, found = [], []
    for attention in ("eager", "sdpa"):
        model = attach(MODELS[family](attention=attention), **terms)
        outputs.append(model(**make_batch(model, samples)))
        found.append(gradients(model, outputs[-1].loss))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    assert_same_gradients(*found, share=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_row(model, samples, terms, side):
    attach(model, **terms)
    together = model(**make_batch(model, samples, side=side))
    for b, sample in enumerate(samples):
        alone = model(**make_batch(model, (sample,)))
        for name in ("text_log_prob", "word_log_prob", "side_log_prob"):
            row = alone[name][0]
            torch.testing.assert_close(together[name][b, : len(row)], row, rtol=1e-5, atol=1e-5)
            assert not together[name][b, len(row) :].any()


def test_text_only_batch_is_the_plain_loss(model, samples, terms):
    batch = make_batch(model, samples[2:3])
    labels = batch["input_ids"].clone()
    labels[:, : -samples[2].answer] = -100
    loss = model(**plain_inputs(batch), labels=labels).loss
    wanted = gradients(model, loss)
    ours = attach(model, **terms)(**batch, labels=labels)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-6, atol=0)
    assert [float(ours.parts[k]) for k in ("word", "smam_grounding", "map_kl")] == [0, 0, 0]
    assert_same_gradients(gradients(model, ours.loss), wanted)


@pytest.mark.parametrize("width", [0, 2])
def test_no_rows_at_all_give_zero_loss_and_zero_gradients(model, samples, terms, width):
    batch = make_batch(model, samples[:2])
    for name, x in batch.items():
        if name.startswith("gk_") and name not in ("gk_image", "gk_side_inside"):
            batch[name] = torch.full_like(x, -1)
            if name.endswith("_position"):
                group = [k for k in batch if k.startswith(name.removesuffix("position"))]
                group += [k for k in batch if k.startswith("gk_several")] * (name[:7] == "gk_word")
                for k in group:
                    rows = "_bag" not in k and k not in ("gk_map_columns", "gk_side_inside")
                    batch[k] = batch[k][:, :width] if rows else batch[k]
    ours = attach(model, **terms).train()(**batch)
    assert float(ours.loss) == 0.0
    found = gradients(model, ours.loss)
    decoder = [k for k in found if "language_model" in k]
    assert "lm_head.weight" in found  # distributed training waits for every parameter
    assert decoder
    assert not any(found[k].any() for k in found)


def test_denominators_come_from_the_accumulated_batch(qwen, terms):
    attach(qwen, **terms)
    batch = make_batch(qwen, SAMPLES["qwen"])
    own = qwen(**batch).parts
    counts = row_counts(batch)
    totals = torch.arange(100, 100 + len(counts))
    given = qwen(**batch, gk_totals=totals, num_items_in_batch=torch.tensor(5)).parts
    divisors = {"text": 0, "smam_grounding": 0, "smam_cross_entropy": 0, "word": 1, "map_kl": 2}
    for name, which in divisors.items():
        expected = own[name] * counts[which] / totals[which]
        torch.testing.assert_close(given[name], expected, rtol=1e-6, atol=0)
    items = qwen(**batch, num_items_in_batch=50).parts
    torch.testing.assert_close(items["text"], own["text"] * counts[0] / 50, rtol=1e-6, atol=0)
    torch.testing.assert_close(items["word"], own["word"], rtol=1e-6, atol=0)


def test_evaluation_reports_every_term_and_training_only_the_attached(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    attach(qwen)
    evaluated = qwen(**batch)
    everything = {"text", "word", "smam_grounding", "smam_cross_entropy", "map_kl"}
    assert evaluated.parts.keys() == everything
    assert float(evaluated.parts["map_kl"]) > 0.1
    assert float(evaluated.loss) == float(evaluated.parts["text"])
    trained = qwen.train()(**batch)
    assert trained.parts.keys() == {"text"}
    assert trained.side_log_prob is None
    torch.testing.assert_close(trained.loss, evaluated.loss, rtol=1e-6, atol=0)
    assert attach(qwen, klal=Klal())(**batch).parts.keys() == {"text", "map_kl"}


def test_predictions_are_the_arg_max_of_full_logits(model, samples):
    batch = make_batch(model, samples)
    logits = model(**plain_inputs(batch)).logits
    ours = attach(model)(**batch)
    for kind in ("text", "word"):
        position = batch[f"gk_{kind}_position"]
        expected = torch.where(position >= 0, rows_of(logits, position).argmax(-1), -1)
        assert torch.equal(ours[f"{kind}_predicted"], expected)


@torch.no_grad()
def test_recorded_maps_are_the_mean_attention_over_the_image(model, samples):
    batch = make_batch(model, samples)
    maps = attach(model)(**batch, gk_record="maps").maps
    own = (batch["gk_map_image"] >= 0).sum()
    torch.testing.assert_close(maps.sum(), own.float())  # each row's map sums to one
    length = int(batch["attention_mask"][0].sum())
    make = MODELS["qwen" if "vision_start_token_id" in vars(model.config) else "llava"]
    one = plain_inputs(make_batch(model, samples[:1]))
    attentions = make(attention="eager")(**one, output_attentions=True).attentions
    t, columns = int(batch["gk_map_position"][0, 0]), batch["gk_map_columns"][0]
    columns = columns[columns >= 0].long()
    a = torch.stack([a[0, :, t][:, columns] for a in attentions])  # [L, H, C]
    expected = (a / a.sum(-1, keepdim=True)).mean((0, 1))
    assert attentions[0].shape[-1] == length
    torch.testing.assert_close(maps[0, 0, : len(columns)], expected, rtol=1e-4, atol=1e-5)


def test_recorded_contributions_equal_the_naive_ones(model, samples, terms):
    batch = make_batch(model, samples, side="left")
    naive = naive_forward(model, batch, **terms, remember=True)
    with torch.inference_mode():
        ours = attach(model)(**batch, gk_record="contributions").contributions
    rows = (batch["gk_side_position"] >= 0).nonzero().tolist()
    assert len(rows) == len(naive.contributions) == 6
    for (b, r), expected in zip(rows, naive.contributions, strict=True):
        row = ours[b, r, : len(expected)]
        torch.testing.assert_close(
            row, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
        assert not ours[b, r, len(expected) :].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_autocast_stays_near_fp32(model, samples, terms, checkpointing):
    batch = make_batch(model, samples)
    attach(model, **terms).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    full = model(**batch)
    wanted = gradients(model, full.loss)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**batch)
    found = gradients(model, low.loss)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, full.loss, rtol=0.03, atol=0)
    assert found.keys() == wanted.keys()
    name = "lm_head.weight"
    cosine = torch.cosine_similarity(found[name].flatten(), wanted[name].flatten(), 0)
    assert float(cosine) > 0.98


def test_bf16_model(qwen, terms):
    full = attach(qwen, **terms)(**make_batch(qwen, SAMPLES["qwen"])).loss
    batch = make_batch(qwen.bfloat16(), SAMPLES["qwen"])
    low = qwen(**batch)
    torch.testing.assert_close(low.loss, full, rtol=0.05, atol=0)
    assert all(g.isfinite().all() for g in gradients(qwen, low.loss).values())


def test_output_is_a_declared_model_output(qwen):
    output = attach(qwen)(**make_batch(qwen, SAMPLES["qwen"]))
    assert output[0] is output.loss
    declared = {field.name for field in dataclasses.fields(GroundedOutput)}
    assert set(output.keys()) <= declared
    assert type(output)(dict(output.items())).loss is output.loss


@torch.no_grad()
@pytest.mark.parametrize("record", ["maps", "contributions", "logits"])
def test_records_of_a_batch_without_rows_are_empty(qwen, record):
    batch = make_batch(attach(qwen), SAMPLES["qwen"][2:3])
    output = qwen(**batch, gk_record=record)
    shapes = {
        "maps": [output.maps],
        "contributions": [output.contributions],
        "logits": [output.main_logits, output.side_logits],
    }
    for name, found in shapes.items():
        assert all((x is not None) == (name == record) for x in found)
    assert all(x.shape[:2] == (1, 0) for x in shapes[record])


def test_no_step_looks_at_a_value(terms, monkeypatch):
    """On a meta device a look at a value (a sync on a GPU) is an error; backward included."""
    mask = "transformers.models.llama.modeling_llama.create_causal_mask"
    # transformers itself looks at the values of masks and images
    monkeypatch.setattr(mask, lambda **inputs: None)
    model = attach(MODELS["llava"](), **terms).to("meta").train()
    batch = make_batch(model, SAMPLES["llava"])
    del batch["pixel_values"]
    try:
        one = torch.zeros(1, 1, device="meta")
        model.get_decoder().rotary_emb(one, position_ids=one)
    except RuntimeError as error:
        detach(model)
        pytest.skip(f"this transformers' RoPE does not run on a meta device: {error}")
    batch = {name: x.to("meta") for name, x in batch.items()}
    output = model(**batch, gk_totals=row_counts(batch))
    assert output.loss.is_meta
    found = gradients(model, output.loss)
    assert all(found[k].is_meta for k, _ in model.named_parameters() if "language_model" in k)
    detach(model)
