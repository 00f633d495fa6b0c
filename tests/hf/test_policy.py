"""Attention as policy: (R1), (R2) against stored eager attention, and what decides which rows."""

from __future__ import annotations

import warnings

import pytest
import torch

from groundkern.hf import AttentionPolicy, attach, detach, policy_rows, row_counts
from groundkern.hf.watching.still_policy import StillPolicy
from groundkern.losses import policy_divergence
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.conftest import MODELS
from tests.hf.naive import run_samples
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, make_batch

LN2 = 0.6931471805599453


def rollouts(model, samples, how: AttentionPolicy, *, side: str = "right", noise: float = 1.0):
    """A batch with advantages of both signs, and references that are not the model's own maps."""
    batch = make_batch(model, samples, side=side)
    generator = torch.Generator().manual_seed(7)
    shape = batch["gk_text_position"].shape
    advantage = torch.randn(shape, generator=generator)
    batch |= policy_rows(batch, advantage, rows=how.rows)
    attach(model, policy=how).eval()
    with torch.no_grad():
        maps = model(**batch, gk_record="policy").policy_maps
    batch["gk_policy_reference"] = (
        maps * (noise * torch.randn(maps.shape, generator=generator)).exp()
    )
    return batch


def alone(batch: dict) -> dict:
    """Without the text loss, whose rows the policy's were made of."""
    return {name: x for name, x in batch.items() if name != "gk_text_position"}


def naive_policy(model, batch: dict, how: AttentionPolicy) -> torch.Tensor:
    """(R1) and (R2) written out in fp64 on stored attention, row by row."""
    total = 0.0
    numbers = {"last": (2,), "all": (0, 1, 2)}.get(how.layers, how.layers)
    for b, sample in enumerate(run_samples(model, batch)):
        rows = batch["gk_policy_position"][b].tolist()
        for r, place in enumerate(rows):
            if place < 0:
                continue
            t = place - sample.first
            keys = [i for i in range(t + 1) if not (how.leaves_out_self and i == t)]
            for m, n in enumerate(numbers):
                p = sample.layers[n][0][:, t, keys].double().mean(0)
                q = batch["gk_policy_reference"][b, r, m][[k + sample.first for k in keys]].double()
                p, q = p / p.sum(), q / q.sum()
                middle = (p + q) / 2
                d = {
                    "js": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
                    "kl": (q * (q / p).log()).sum(),
                    "reverse_kl": (p * (p / q).log()).sum(),
                }[how.divergence]
                total = total + float(batch["gk_policy_weight"][b, r]) * d / len(numbers)
    return how.weight * total / int((batch["gk_policy_position"] >= 0).sum())


@pytest.mark.parametrize(
    ("how", "side"),
    [
        (AttentionPolicy(), "left"),
        (AttentionPolicy(weight=0.5, layers="all", divergence="kl"), "right"),
        (AttentionPolicy(layers=(0, 2), exclude_self=False), "left"),
        (AttentionPolicy(layers=(1,), rows="predictor", divergence="reverse_kl"), "right"),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_written_out(qwen, how, side):
    batch = rollouts(qwen, SAMPLES["qwen"], how, side=side)
    ours = qwen.train()(**alone(batch))
    found = gradients(qwen, ours.loss)
    wanted = naive_policy(qwen, batch, how)
    torch.testing.assert_close(ours.loss.detach(), wanted.detach().float(), rtol=2e-4, atol=1e-6)
    expected = gradients(qwen, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=5e-4)


def test_own_position_matters_and_is_left_out_after_the_head_mean():
    # heads (.9 own, .1 first) and (.1 own, .3 first, .6 second): their mean is own .5, first .2,
    # second .3, and without own .4 and .6; renormalised first, it would be (1 + 1/3) / 2 = 2/3
    attention = torch.tensor([0.2, 0.3, 0.5])
    seen = torch.tensor([True, True, False])
    same = policy_divergence(attention, torch.tensor([4.0, 6.0, 9.0]), seen)
    assert float(same) < 1e-7
    # p = (.5, .5), q = (1, 0), m = (.75, .25): JS = (ln 2/3 + ln 2) / 4 + ln(4/3) / 2 = .215762
    half = policy_divergence(torch.tensor([0.2, 0.2, 0.6]), torch.tensor([3.0, 0.0, 1.0]), seen)
    torch.testing.assert_close(float(half), 0.2157615, rtol=1e-5, atol=0)
    # p = (1, 0), q = (0, 1): JS = ln 2
    apart = policy_divergence(torch.tensor([0.2, 0.0, 0.6]), torch.tensor([0.0, 3.0, 1.0]), seen)
    torch.testing.assert_close(float(apart), LN2, rtol=1e-6, atol=0)


def test_the_gradient_to_scores_is_the_one_on_paper():
    # d JS / d p_i = 1/2 ln(p_i / m_i); to the scores p_i (g_i - sum_j p_j g_j)
    scores = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    p, q = scores.softmax(-1), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    policy_divergence(p, q, torch.ones(3, dtype=torch.bool)).backward()
    p = p.detach()
    g = 0.5 * (p / ((p + q) / 2)).log()
    torch.testing.assert_close(scores.grad, p * (g - (p * g).sum()))


def test_the_sign_of_the_advantage_is_the_sign_of_the_gradient(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"][:1], AttentionPolicy())
    batch["gk_policy_weight"] = torch.ones_like(batch["gk_policy_weight"])
    towards = gradients(qwen, qwen.train()(**alone(batch)).loss)
    batch["gk_policy_weight"] = -batch["gk_policy_weight"]
    away = gradients(qwen, qwen(**alone(batch)).loss)
    assert towards["model.language_model.layers.2.self_attn.q_proj.weight"].any()
    assert all(torch.equal(towards[k], -away[k]) for k in towards)


def test_nothing_is_learnt_where_the_policy_is_the_old_one(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"], AttentionPolicy(layers="all"), noise=0.0)
    apart = rollouts(qwen, SAMPLES["qwen"], AttentionPolicy(layers="all"), noise=0.1)
    output = qwen.train()(**alone(batch))
    assert abs(float(output.parts["policy_divergence"])) < 1e-6
    still, moved = (gradients(qwen, qwen(**alone(x)).loss) for x in (batch, apart))
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert float(still[name].abs().max()) < 1e-4 * float(moved[name].abs().max())


def test_packed_rows_have_the_losses_of_padded_ones():
    layers = ["full_attention", "sliding_attention", "full_attention"]
    qwen = MODELS["qwen"](
        layer_types=layers, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    rows = tuple(tuple(SAMPLES["qwen"][i] for i in row) for row in ((0, 1), (3, 2)))
    how = AttentionPolicy(layers="all")
    padded = rollouts(qwen, tuple(x for row in rows for x in row), how)
    packed = packed_batch(qwen, rows)
    packed |= policy_rows(packed, torch.ones(2))
    reference = padded["gk_policy_reference"]
    placed = torch.zeros(*packed["gk_policy_position"].shape, 3, packed["input_ids"].shape[1])
    own, other = (x["gk_policy_position"] for x in (padded, packed))
    for old, new in zip((own >= 0).nonzero(), (other >= 0).nonzero(), strict=True):
        b, r = new.tolist()
        place = int(other[b, r])
        start = place - int(packed["position_ids"][b, place])
        last = place - start + 1
        assert last == int(own[tuple(old)]) + 1
        placed[b, r, :, start : place + 1] = reference[tuple(old)][:, :last]
        packed["gk_policy_weight"][b, r] = padded["gk_policy_weight"][tuple(old)]
    packed["gk_policy_reference"] = placed
    wanted, ours = (qwen.train()(**alone(x)).loss for x in (padded, packed))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-7)
    assert_same_gradients(gradients(qwen, ours), gradients(qwen, wanted), share=1e-4)
    detach(qwen)


def test_rows_of_weight_0_count_and_two_signs_cancel(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"][:1], AttentionPolicy())
    batch["gk_policy_weight"] = torch.zeros_like(batch["gk_policy_weight"])
    batch["gk_policy_weight"][0, 1] = 2.0
    loss = qwen.train()(**alone(batch)).parts["policy"]
    for name in ("position", "weight"):
        batch[f"gk_policy_{name}"] = batch[f"gk_policy_{name}"][:, 1:2]
    batch["gk_policy_reference"] = batch["gk_policy_reference"][:, 1:2]
    one = qwen(**alone(batch)).parts["policy"]
    torch.testing.assert_close(loss * 5, one, rtol=1e-5, atol=0)  # 5 tokens in the answer


def test_accumulated_batches_are_one_batch(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"][2:], AttentionPolicy(layers="all"), side="left")
    whole = gradients(qwen, qwen.train()(**alone(batch)).loss)
    totals = row_counts(alone(batch))
    for b in range(2):  # of text, and of an image that takes all pixels with it
        names = ("gk_policy_position", "gk_policy_weight")
        part = {k: x.clone() if k in names else x for k, x in batch.items()}
        part["gk_policy_position"][1 - b] = -1
        qwen(**alone(part), gk_totals=totals).loss.backward()
    found = {k: p.grad for k, p in qwen.named_parameters() if p.grad is not None}
    assert_same_gradients(found, whole, share=1e-4)


def test_checkpointing_changes_nothing(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"], AttentionPolicy(layers="all"))
    wanted = gradients(qwen, qwen.train()(**alone(batch)).loss)
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(qwen, qwen(**alone(batch)).loss), wanted, share=1e-4)
    qwen.gradient_checkpointing_enable({"use_reentrant": True})
    qwen.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        qwen(**alone(batch))


def test_a_batch_without_rows_trains_its_text_alone(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    plain = attach(qwen).train()(**batch).loss
    output = attach(qwen, policy=AttentionPolicy())(**batch)
    assert torch.equal(output.loss, plain)
    assert float(output.parts["policy"]) == 0.0


def test_references_in_16_bits_are_taken_as_they_are(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"], AttentionPolicy())
    batch["gk_policy_reference"] = batch["gk_policy_reference"].bfloat16()
    short = qwen.train()(**alone(batch)).loss
    batch["gk_policy_reference"] = batch["gk_policy_reference"].float()
    assert torch.equal(short, qwen(**alone(batch)).loss)


def test_what_is_missing_is_refused_by_name(qwen):
    batch = rollouts(qwen, SAMPLES["qwen"], AttentionPolicy())
    for name, reason in (("reference", "for gk_policy_position"), ("position", "gk_policy_weight")):
        rest = {k: x for k, x in batch.items() if k != f"gk_policy_{name}"}
        with pytest.raises(ValueError, match=reason):
            qwen(**rest)
    attach(qwen, policy=AttentionPolicy(layers=(0, 1)))
    with pytest.raises(ValueError, match="of layers"):
        qwen(**batch)
    with pytest.raises(ValueError, match="layers in"):
        attach(qwen, policy=AttentionPolicy(layers=(3,)))
    for layers in ("first", (2, 1), ()):
        with pytest.raises(ValueError, match="ascending order, or last or all"):
            AttentionPolicy(layers=layers)


def test_a_policy_that_never_moves_is_told_once():
    watch = StillPolicy()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(1, 40):
            watch.look({"policy_divergence": 1e-8}, step)
    assert [str(one.message)[:60] for one in told] == [
        "`policy`: attention was that of its references in the first "
    ]
    moved = StillPolicy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 40):
            moved.look({"policy_divergence": 0.01 if step == 2 else 0.0}, step)
        StillPolicy().look({"map_kl": 0.0}, 50)
