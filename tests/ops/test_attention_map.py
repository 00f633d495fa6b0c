"""What attention maps promise beyond the contract: normalisation, reach of gradients, log space."""

from dataclasses import replace

import pytest
import torch

from groundkern import attention_contribution, attention_kl, attention_map, side_attention
from groundkern.ops.attention_map import cases
from tests.ops.test_contract import CPU, differentiate


def _call(name: str, dtype=torch.float32):
    call = cases.CASES[name](dtype, CPU)
    return replace(call, options={**call.options, "backend": "reference"})


def _own(call) -> torch.Tensor:
    """bool [N, C] by brute force."""
    rows, columns = call.options["rows"], call.options["columns"]
    own = torch.zeros(len(rows), columns.shape[1], dtype=torch.bool)
    for n in range(len(rows)):
        for c, j in enumerate(columns[int(rows.sequence[n])].tolist()):
            own[n, c] = j >= 0 and int(rows.start[n]) <= j < int(rows.stop[n])
    return own


def test_over_columns_sums_to_one_and_over_visible_to_less() -> None:
    own = _own(_call("map_columns"))
    over_columns, over_visible = (_call(f"map_{o}").run()[0] for o in ("columns", "visible"))
    some = own.any(1)
    torch.testing.assert_close(over_columns.sum(1), some.float())
    assert (over_visible.sum(1)[some] < 1).all()
    assert not over_columns[~own].any() and not over_visible[~own].any()


def test_over_visible_pushes_gradient_outside_the_columns() -> None:
    call = _call("map_visible")
    _, (_, dk) = differentiate(call)
    outside = torch.ones(2, cases.KEYS, dtype=torch.bool)
    for b, columns in enumerate(cases.COLUMNS):
        outside[b, [c for c in columns if c >= 0]] = False
    share = dk.abs().sum((1, 3))[outside].sum() / dk.abs().sum()
    assert share > 0.2, "the denominator's gradient lies outside the columns"
    _, (_, dk) = differentiate(_call("map_columns"))
    assert not dk.abs().sum((1, 3))[outside].any()


def test_a_given_lse_is_the_normaliser() -> None:
    call = _call("map_visible_lse")
    shifted = call.run(lse=call.options["lse"] + 1.0)[0]
    torch.testing.assert_close(shifted, call.run()[0] * torch.tensor(-1.0).exp())


def test_kl_stays_finite_where_probabilities_underflow() -> None:
    call = _call("kl_flat_heads")
    wide = _call("kl_flat_heads", torch.float64)
    options = {k: x for k, x in call.options.items() if k != "heads"}
    maps = attention_map(call.inputs["q"], call.inputs["k"], **options)
    assert ((maps == 0) & (_own(call))).any(), "the case must underflow"
    (ours,), gradients = differentiate(call)
    (truth,), true_gradients = differentiate(wide)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-3)
    for g, t in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-3, atol=1e-3 * t.abs().max())


def test_per_head_kl_has_its_closed_form() -> None:
    """KL(P || a^h) = sum P log P - scale q . (sum_j P_j k_j) + lse_h, each head's (K3)."""
    call = _call("kl_columns_each", torch.float64)
    rows, columns = call.options["rows"], call.options["columns"]
    n = 0  # this row owns all its columns
    at = columns[0].long()
    target = call.inputs["target"][n].double()
    target = target / target.sum()
    q, k = call.inputs["q"][n], call.inputs["k"][0].repeat_interleave(2, 0)[:, at]  # [Hq, C, D]
    scale = q.shape[-1] ** -0.5
    lse = (scale * (k @ q[..., None])[..., 0]).logsumexp(-1)
    mean_key = (target[:, None] * k).sum(1)  # [Hq, D]
    closed = torch.xlogy(target, target).sum() - scale * (q * mean_key).sum(-1) + lse
    assert int(rows.stop[n]) == 45
    torch.testing.assert_close(call.run()[0][n], closed.mean())


def test_target_mass_elsewhere_is_dropped_and_the_rest_renormalised() -> None:
    call = _call("kl_columns_mean")
    own = _own(call)
    target = call.inputs["target"]
    assert (target[~own] > 0).any()
    moved = torch.where(own, 5 * target, torch.rand_like(target))
    torch.testing.assert_close(call.run(target=moved)[0], call.run()[0])
    nothing = ~(own & (target > 0)).any(1)
    assert nothing.any() and not call.run()[0][nothing].any()


def test_kl_of_the_map_itself_is_zero() -> None:
    call = _call("kl_columns_mean_sets_weights", torch.float64)
    weight = call.inputs["head_weight"].double()
    weight = weight / weight.sum()
    options = {k: x for k, x in call.options.items() if k != "heads"}
    maps = attention_map(call.inputs["q"], call.inputs["k"], head_weight=weight, **options)
    kl = call.run(target=maps, head_weight=weight)[0]
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-12, rtol=0)


def test_a_zero_head_weight_still_gets_its_gradient() -> None:
    call = _call("kl_visible_mean", torch.float64)
    weight = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(call.run(head_weight=weight)[0].sum(), weight)
    step = torch.tensor([1e-6, 0, 0, 0], dtype=torch.float64)
    change = (call.run(head_weight=weight + step)[0] - call.run(head_weight=weight)[0]).sum() / 1e-6
    torch.testing.assert_close(gradient[0], change.detach(), rtol=1e-4, atol=0)


def test_contributions_over_all_keys_sum_to_the_attention_output() -> None:
    call = _call("contribution_visible", torch.float64)
    q, k, v, g = call.inputs.values()
    rows = call.options["rows"]
    every = torch.arange(cases.KEYS, dtype=torch.int32).repeat(2, 1)
    total = attention_contribution(q, k, v, g, rows, every, over="visible").sum(1)
    out = side_attention(q, k, v, rows).out
    torch.testing.assert_close(total, (out * g).sum((1, 2)))


@pytest.mark.parametrize("over", ["visible", "columns"])
def test_default_is_the_mean_of_the_heads(over: str) -> None:
    call = _call(f"kl_{over}_mean")
    uniform = torch.full((4,), 0.25)
    torch.testing.assert_close(call.run()[0], call.run(attention_kl, head_weight=uniform)[0])
