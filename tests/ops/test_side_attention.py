"""What side attention promises beyond the contract: statistics, merging, masks that matter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from groundkern import KeySets, QueryRows, side_attention
from groundkern.ops.side_attention import cases
from tests.ops.test_contract import CPU, SERVED, differentiate

SERVES = dict.fromkeys(b for case, b in SERVED if case.startswith("side_attention/"))
each_backend = pytest.mark.parametrize("backend", SERVES)


def _call(name: str, backend: str):
    call = cases.CASES[name](torch.float32, CPU)
    return replace(call, options={**call.options, "backend": backend})


@each_backend
def test_equals_scaled_dot_product_attention(backend: str) -> None:
    q, k, v = (torch.randn(2, h, 19, 16) for h in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    sequence = torch.arange(2).repeat_interleave(19)
    rows = QueryRows.causal(sequence, torch.arange(19).repeat(2))
    out = side_attention(rows.take(q), k, v, rows, backend=backend).out
    torch.testing.assert_close(out, rows.take(expected))


@each_backend
@pytest.mark.parametrize("name", ["main_statistics", "underflow"])
def test_a_given_lse_never_changes_the_result(name: str, backend: str) -> None:
    call = _call(name, backend)
    with_lse = differentiate(call)
    without = differentiate(replace(call, options={**call.options, "lse": None}))
    for pair in zip(with_lse, without, strict=True):
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("heads", [3, 70, 140])
def test_one_key_takes_all_whatever_the_shift(heads: int, backend: str) -> None:
    """Its value comes out to the bit, and its score gets no gradient: p (dp - delta) cancels, also
    where p of a given lse is no number that bf16 has."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(s, generator=draw).to(torch.bfloat16)
        for s in ((2, heads, 32), (1, 1, 9, 32), (1, 1, 9, 32))
    )
    rows = QueryRows.causal(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    shift = torch.einsum("nhd,d->nh", q.float(), k[0, 0, 0].float()) * 32**-0.5 + 0.37
    q.requires_grad_()
    out = side_attention(q, k, v, rows, lse=shift, backend=backend).out
    assert torch.equal(out, v[0, 0, 0].expand_as(out))
    (dq,) = torch.autograd.grad(out, q, torch.randn(out.shape, generator=draw).to(out.dtype))
    assert float(dq.abs().max()) < 1e-4


@each_backend
def test_two_halves_merge_into_the_whole(backend: str) -> None:
    """out and lse of disjoint key sets are enough to recover attention over their union."""
    call = _call("causal", backend)
    n, keys = len(call.options["rows"]), call.inputs["k"].shape[2]
    even = (torch.arange(keys) % 2 == 0)[None]
    index = torch.zeros(n, dtype=torch.int32)
    halves = [call.run(allowed=KeySets.from_bool(m, index)) for m in (even, ~even)]
    out, lse = call.run()
    merged_lse = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(o * (s - merged_lse).exp()[..., None] for o, s in halves)
    torch.testing.assert_close(merged_lse, lse)
    torch.testing.assert_close(merged, out)


@each_backend
def test_a_mask_changes_values_and_gradients(backend: str) -> None:
    call = _call("regions", backend)
    masked, dmasked = differentiate(call)
    free, dfree = differentiate(replace(call, options={**call.options, "allowed": None}))
    assert not torch.allclose(masked[0], free[0])
    assert all(not torch.allclose(a, b) for a, b in zip(dmasked, dfree, strict=True))


@each_backend
def test_keys_no_row_may_use_get_zero_gradient(backend: str) -> None:
    call = _call("many_keys", backend)
    allowed = torch.zeros(1, 611, dtype=torch.bool)
    allowed[0, 100:120] = True
    sets = KeySets.from_bool(allowed, torch.zeros(9, dtype=torch.int32))
    _, (_, dk, dv) = differentiate(replace(call, options={**call.options, "allowed": sets}))
    unused = ~allowed[0]
    assert not dk[:, :, unused].any() and not dv[:, :, unused].any()
    assert dk[:, :, ~unused].abs().amin(-1).min() > 0


@each_backend
def test_region_mass_is_the_share_of_the_main_pass(backend: str) -> None:
    call = _call("main_statistics", backend)
    mass = (call.run()[1] - call.options["lse"]).exp()
    assert ((mass > 0) & (mass <= 1 + 1e-6)).all()
    restricted = call.options["allowed"].index >= 0
    torch.testing.assert_close(mass[~restricted], torch.ones_like(mass[~restricted]))
    assert (mass[restricted] < 1).any()


def test_the_given_lse_gets_no_gradient() -> None:
    call = _call("main_statistics", "reference")
    lse = call.options["lse"].clone().requires_grad_()
    call.run(lse=lse, **{n: x.requires_grad_() for n, x in call.inputs.items()})[0].sum().backward()
    assert lse.grad is None
