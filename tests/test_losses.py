"""Losses against the equations written out, and at edges at which a naive version returns NaN."""

from __future__ import annotations

import math

import pytest
import torch

from groundkern.losses import (
    composition,
    contrastive,
    logit_lens,
    map_divergence,
    map_kl,
    margins,
    mean_rows,
    smam,
    word_cross_entropy,
)


def test_smam_is_equations_s3_to_s5():
    log_prob = torch.tensor([-0.1, -2.0, -7.0], dtype=torch.float64)
    side = torch.tensor([-0.5, -0.2, -9.0], dtype=torch.float64)
    loss = smam(log_prob, side, beta=0.3, alpha=0.7, gamma=1.5)
    for n in range(3):
        margin = 0.3 * (log_prob[n].item() - side[n].item())
        grounding = -math.log(1 / (1 + math.exp(-margin)))
        assert loss.grounding[n].item() == pytest.approx(grounding, rel=1e-12)
        assert loss.cross_entropy[n].item() == -side[n].item()
        assert loss.total[n].item() == pytest.approx(1.5 * grounding - 0.7 * side[n].item())


def test_smam_gradients_are_finite_and_right():
    log_prob = torch.tensor([-0.1, -2.0], dtype=torch.float64, requires_grad=True)
    side = torch.tensor([-0.5, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: tuple(smam(a, b)), (log_prob, side))
    far = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = smam(far, torch.tensor([0.0, -1e4]), beta=1.0)
    assert loss.grounding.tolist() == pytest.approx([1e4, 0.0])
    loss.total.sum().backward()
    assert far.grad.tolist() == pytest.approx([-2.0, 0.0])


@pytest.mark.parametrize(("gamma", "pushes_down"), [(1.9, False), (2.1, True)])
def test_smam_pushes_side_down_only_beyond_the_documented_bound(gamma, pushes_down):
    side = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    smam(torch.tensor([-1.0], dtype=torch.float64), side, beta=0.1, alpha=0.1, gamma=gamma)[
        0
    ].sum().backward()
    assert (side.grad.item() > 0) == pushes_down


def test_smam_detached_reference_still_learns_its_cross_entropy():
    side = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = smam(torch.tensor([-2.0, -0.5]), side, alpha=0.25, detach_reference=True)
    loss.total.sum().backward()
    assert side.grad.tolist() == [-0.25, -0.25]


def test_smam_is_fp32_for_half_precision_and_refuses_other_shapes():
    loss = smam(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16))
    assert all(part.dtype == torch.float32 for part in loss)
    with pytest.raises(ValueError, match=r"`side_log_prob`: expected the shape of `log_prob`"):
        smam(torch.zeros(2), torch.zeros(3))


def test_mean_rows_ignores_whatever_is_not_counted():
    rows = torch.tensor([1.0, math.nan, 3.0, math.inf], requires_grad=True)
    counted = torch.tensor([True, False, True, False])
    mean = mean_rows(rows, counted)
    assert mean.item() == 2.0
    mean.backward()
    assert rows.grad.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert mean_rows(rows, counted, denominator=8).item() == 0.5


@pytest.mark.parametrize("rows", [torch.zeros(0), torch.tensor([math.nan, 2.0])])
def test_mean_rows_of_nothing_is_zero(rows):
    rows = rows.clone().requires_grad_()
    mean = mean_rows(rows, torch.zeros(rows.shape, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert rows.grad.tolist() == [0.0] * len(rows)


def test_word_cross_entropy_is_equation_d3():
    logits = torch.randn(4, 11, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    label = torch.tensor([3, 5, 3, 9])
    others = [[5, 9], [3, 9], [5, 9], []]  # the last image has one label only
    expected = []
    for n in range(4):
        loss = -log_p[n, label[n]]
        if others[n]:
            loss = 0.7 * loss - 0.3 / len(others[n]) * sum(log_p[n, y] for y in others[n])
        expected.append(loss)
    mean_others = [log_p[n, others[n]].mean() for n in range(4)]  # the last one is NaN
    rows = word_cross_entropy(
        log_p[torch.arange(4), label],
        torch.stack(mean_others),
        torch.tensor([bool(o) for o in others]),
    )
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-12, atol=0)


def test_word_cross_entropy_without_others_has_no_gradient_towards_them():
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    others = torch.tensor([math.nan, -4.0], requires_grad=True)
    word_cross_entropy(log_prob, others, torch.tensor([False, True])).sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([-1.0, -0.7])
    assert others.grad.tolist() == pytest.approx([0.0, -0.3])


def test_the_mean_of_rows_counts_only_counted_ones():
    text, word = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([10.0, 30.0])
    counted = torch.tensor([True, True, False])
    parts = mean_rows(text, counted), mean_rows(word)
    assert [x.item() for x in parts] == pytest.approx([1.5, 20.0])
    assert mean_rows(text).item() == 4.0 and mean_rows(word[:0]).item() == 0.0


def test_map_kl_is_torch_kl_whatever_the_target_scale():
    target, attention = torch.rand(5, 9).softmax(-1), torch.rand(5, 9).softmax(-1)
    truth = torch.nn.functional.kl_div(attention.log(), target, reduction="none").sum(-1)
    torch.testing.assert_close(map_kl(target, attention), truth)
    torch.testing.assert_close(map_kl(target * 2**20, attention), truth)


def test_map_kl_renormalises_the_attention():
    target, attention = torch.rand(3, 6), 0.05 * torch.rand(3, 6)
    normalised = attention / attention.sum(-1, keepdim=True)
    expected = map_kl(target, normalised)
    torch.testing.assert_close(map_kl(target, attention, renormalise=True), expected)
    assert (map_kl(target, attention) > expected + 1).all()


@pytest.mark.parametrize("renormalise", [False, True])
def test_map_kl_gradient(renormalise):
    target = torch.rand(3, 6, dtype=torch.float64)
    target[0, :3] = 0
    target[2] = 0
    attention = torch.rand(3, 6, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: map_kl(target, a, renormalise=renormalise), (attention,)
    )


@pytest.mark.parametrize("renormalise", [False, True])
def test_map_kl_is_finite_on_zeros_and_zero_without_a_target(renormalise):
    target = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    attention = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    attention.requires_grad_()
    kl = map_kl(target, attention, renormalise=renormalise)
    kl.sum().backward()
    assert kl[0].item() == 0.0
    assert attention.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert kl.isfinite().all()
    assert attention.grad.isfinite().all()
    assert kl[1].item() > 30  # half of the target's mass lies where there is no attention


def test_the_mean_of_rows_takes_layers_too():
    kl = torch.tensor([[1.0, math.nan, 3.0], [5.0, 100.0, 7.0]])
    assert mean_rows(kl, torch.tensor([True, False, True])).item() == 4.0
    owns = torch.tensor([[True, False, False], [False, True, True]])
    assert mean_rows(kl, owns).item() == 36.0
    assert mean_rows(kl, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_composition_is_equation_h3():
    whole = torch.tensor([[3.0, 4.0], [1.0, 1.0]], requires_grad=True)
    first = torch.tensor([[0.0, 0.0], [0.4, 1.0]], requires_grad=True)
    second = torch.tensor([[0.0, 0.0], [0.6, 0.0]])
    rows = composition(whole, first, second)
    assert rows.tolist() == pytest.approx([5.0, 0.0])
    rows.sum().backward()
    assert whole.grad.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]
    assert first.grad.tolist() == [pytest.approx([-0.6, -0.8]), [0.0, 0.0]]
    assert composition(whole.detach(), first, second, detach_parts=True).requires_grad is False


@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1", "kl"])
def test_composition_distances_and_gradients(distance):
    maps = [torch.rand(3, 5, dtype=torch.float64).add(0.1) for _ in range(3)]
    whole, parts = maps[0], maps[1] + maps[2]
    difference = (whole - parts).abs()
    p, q = parts / parts.sum(-1, keepdim=True), whole / whole.sum(-1, keepdim=True)
    expected = {
        "l1": difference.sum(-1),
        "l2": difference.square().sum(-1).sqrt(),
        "smooth_l1": torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).sum(-1),
        "kl": (p * (p / q).log()).sum(-1),
    }[distance]
    torch.testing.assert_close(composition(*maps, distance=distance), expected)
    inputs = tuple(x.requires_grad_() for x in maps)
    assert torch.autograd.gradcheck(lambda *m: composition(*m, distance=distance), inputs)


def test_composition_of_empty_maps_is_zero_and_an_unknown_distance_an_error():
    whole = torch.zeros(1, 3, requires_grad=True)
    for distance in ("l1", "l2", "smooth_l1", "kl"):
        rows = composition(whole, torch.zeros(1, 3), torch.zeros(1, 3), distance=distance)
        assert rows.tolist() == [0.0]
        assert torch.autograd.grad(rows.sum(), whole)[0].isfinite().all()
    with pytest.raises(ValueError, match="distance"):
        composition(whole, whole, whole, distance="cosine")


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_map_divergence_is_its_equation(kind, renormalise):
    target = torch.rand(4, 6, dtype=torch.float64).add(0.05)
    target[0, :3] = 0.0
    attention = torch.rand(4, 6, dtype=torch.float64).add(0.05).softmax(-1)
    attention = attention if kind == "reverse_kl" else 0.7 * attention
    p = target / target.sum(-1, keepdim=True)
    q = attention / attention.sum(-1, keepdim=True) if renormalise else attention
    floored = p.clamp_min(1e-6)
    floored = floored / floored.sum(-1, keepdim=True)
    m = (p + q) / 2
    half = torch.xlogy(p, p / m).sum(-1) + (q * (q / m).log()).sum(-1)
    expected = {
        "kl": torch.xlogy(p, p / q).sum(-1),
        "reverse_kl": (q * (q / floored).log()).sum(-1),
        "js": 0.5 * (half + (1 - q.sum(-1)) * math.log(2)),
    }[kind]
    options = {"kind": kind, "renormalise": renormalise}
    torch.testing.assert_close(map_divergence(target, attention, **options), expected)
    attention.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: map_divergence(target, a, **options), (attention,))


def test_js_of_full_rows_is_that_of_the_longer_distributions():
    """Mass off the columns is one more outcome that the target never has."""
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.3, 0.2, 0.1]])
    off = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    full = map_divergence(torch.cat([p, torch.zeros(1, 1)], -1), off, kind="js")
    torch.testing.assert_close(map_divergence(p, q, kind="js"), full)


@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
def test_map_divergence_is_finite_at_the_edges(kind):
    target = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    attention = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    rows = map_divergence(target, attention, kind=kind, valid=valid)
    gradient = torch.autograd.grad(rows.sum(), attention)[0]
    assert rows[0].item() == 0.0
    assert gradient[0].tolist() == [0.0, 0.0]
    assert rows.isfinite().all()
    assert gradient.isfinite().all()
    assert rows[1].item() == pytest.approx(math.log(2) if kind == "js" else 13.8155, rel=1e-4)
    with pytest.raises(ValueError, match="kind"):
        map_divergence(target, attention, kind="hellinger")


def test_margins_are_amc_and_zero_if_a_side_is_empty():
    attention = torch.tensor([[0.9, 0.5, 0.2, 9.0], [1.0, 1.0, 0.0, 0.0], [0.3, 0.1, 0.0, 0.0]])
    inside = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    attention.requires_grad_()
    rows = margins(attention, inside, valid=valid, mean_margin=0.6, max_margin=0.5)
    assert rows.mean.tolist() == pytest.approx([0.2 - 0.7 + 0.6, 0.0, 0.3 - 0.1 + 0.6])
    assert rows.max.tolist() == pytest.approx([0.0, 0.0, 0.3 - 0.1 + 0.5])
    gradient = torch.autograd.grad(rows.mean.sum(), attention)[0]
    assert gradient[0].tolist() == pytest.approx([-0.5, -0.5, 1.0, 0.0])
    assert gradient[1].tolist() == [0.0] * 4
    assert margins(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).max.tolist() == [0, 0]


def test_logit_lens_raises_inside_and_suppresses_outside():
    log_prob = torch.tensor([0.25, 0.25, 0.999, 1e-9], dtype=torch.float64).log()
    inside = torch.tensor([True, False, False, False])
    rows = logit_lens(log_prob, inside)
    expected = [-math.log(0.25), -math.log(0.75), -math.log(0.001), 1e-9]
    assert rows.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: logit_lens(x, inside[:3]), (log_prob[:3].clone().requires_grad_(),)
    )
    certain = torch.tensor([0.0, -200.0], requires_grad=True)
    rows = logit_lens(certain, torch.tensor([False, False]))
    assert rows.isfinite().all()
    assert torch.autograd.grad(rows.sum(), certain)[0].isfinite().all()


def test_contrastive_spreads_over_matches_and_ignores_rows_without_any():
    similarity = torch.randn(2, 4, dtype=torch.float64)
    match = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]).bool()
    texts = similarity.log_softmax(1)
    images = similarity.log_softmax(0)
    by_image = (-(texts[0, :2].mean()) - texts[1, 2]) / 2
    by_text = -(images[0, 0] + images[0, 1] + images[1, 2]) / 3
    torch.testing.assert_close(contrastive(similarity, match), (by_image + by_text) / 2)
    assert contrastive(similarity[:, :0], match[:, :0]).item() == 0.0


def test_the_mass_of_two_heads_by_hand():
    # Two heads, two image columns and a text column. Head 1 has .9 on column 0 (the target) and .1
    # on text, head 2 .1 on column 1 and .9 on text. Head means: .45 and .05 (GuidedVLA: -log .45);
    # of their sum .5 the target has .9 (A3Tune: (1 - .9)^2 = .01).
    heads = torch.tensor([[0.9, 0.0], [0.0, 0.1]], dtype=torch.float64)
    target, attention = torch.tensor([3.0, 0.0]), heads.mean(0).requires_grad_()
    mass = map_divergence(target, attention, kind="mass")
    assert mass.item() == pytest.approx(-math.log(0.45))
    (gradient,) = torch.autograd.grad(mass, attention)
    assert gradient.tolist() == pytest.approx([-1 / 0.45, 0.0])
    share = map_divergence(target, attention, kind="share", renormalise=True)
    assert share.item() == pytest.approx(0.01)
    (gradient,) = torch.autograd.grad(share, attention)
    # d (1 - a / (a + b))^2 = -2 (1 - .9) (b, -a) / (a + b)^2
    wanted = [-0.2 * 0.05 / 0.25, 0.2 * 0.45 / 0.25]
    assert gradient.tolist() == pytest.approx(wanted)
    soft = map_divergence(torch.tensor([4.0, 2.0]), attention, kind="mass")  # .45 + .05 / 2
    assert soft.item() == pytest.approx(-math.log(0.475))
    shared = map_divergence(target, attention, kind="mass", renormalise=True)
    assert shared.item() == pytest.approx(-math.log(0.9))


@pytest.mark.parametrize("kind", ["mass", "share"])
def test_mass_losses_where_there_is_little_or_nothing(kind):
    attention = torch.tensor([[1e-30, 0.5], [0.3, 0.7], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    rows = map_divergence(target, attention, kind=kind)
    assert rows[1].item() == 0.0
    assert rows.isfinite().all()
    (gradient,) = torch.autograd.grad(rows.sum(), attention)
    assert gradient.isfinite().all()
    assert gradient[1].tolist() == [0.0, 0.0]
    if kind == "mass":
        assert rows[0].item() == pytest.approx(30 * math.log(10))
        assert gradient[0, 0].item() == pytest.approx(-1e30)
    assert map_divergence(target[:, :0], attention[:, :0], kind=kind).tolist() == [0.0] * 3
    many = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    where = (many > 0.4).double()
    assert torch.autograd.gradcheck(
        lambda x: map_divergence(where, x, kind=kind, renormalise=True), many.requires_grad_()
    )


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "mass", "share"])
def test_a_map_too_small_to_divide_has_no_gradient(kind) -> None:
    """All its attention underflows: 1 / 0 times upstream gradients would be inf, then NaN."""
    attention = torch.zeros(3, 4)
    attention[1] = 1e-36
    attention[2] = torch.tensor([0.1, 0.2, 0.3, 0.1])
    attention.requires_grad_()
    target = torch.tensor([[4.0, 1.0, 2.0, 3.0]]).expand(3, 4)
    rows = map_divergence(target, attention, kind=kind, renormalise=True)
    (gradient,) = torch.autograd.grad(rows, attention, torch.full((3,), 50.0))
    assert bool(rows.isfinite().all())
    if kind in ("reverse_kl", "js", "share"):
        assert not gradient[:2].any()
    assert bool(gradient[[0, 2]].isfinite().all()) and bool(gradient[2].any())
