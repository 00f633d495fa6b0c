"""What the kernels of attention maps could get wrong beyond the contract's cases."""

from dataclasses import replace

import pytest
import torch

from groundkern import (
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    available_backends,
    tiles,
)
from groundkern.ops.attention_map import cases
from tests.ops.test_contract import CPU, differentiate

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)


def _same(call) -> None:
    """Values and gradients of triton and reference agree."""
    pair = [differentiate(call, backend=name) for name in ("triton", "reference")]
    for a, b in zip(*((*results, *gradients) for results, gradients in pair), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("function", "over", "options"),
    [
        (attention_map, "visible", {}),
        (attention_kl, "columns", {"heads": "mean"}),
        (attention_contribution, "visible", {"rectify": True}),
    ],
    ids=["map", "kl", "contribution"],
)
def test_a_group_wider_than_a_tile_of_rows(function, over: str, options: dict) -> None:
    """40 query heads share a KV head: the heads of one row are several tiles, the last ragged."""
    _same(cases.call(function, torch.float32, CPU, shape=(40, 1), over=over, **options))


def test_weights_of_zero_and_a_head_far_above_the_others() -> None:
    """log 0 in the mixture, and a finite gradient for a head of weight 0 that is far above it."""
    call = cases.call(attention_kl, torch.float32, CPU, over="visible", heads="mean")
    weight = torch.tensor([0.0, 0.7, 0.3, 0.0]).repeat(12, 1)
    q = call.inputs["q"].clone()
    q[:, 3] *= 30
    call = replace(call, inputs={**call.inputs, "q": q, "head_weight": weight})
    results, gradients = differentiate(call, backend="triton")
    assert all(x.isfinite().all() for x in (*results, *gradients))
    truth, expected = differentiate(call, backend="reference")
    torch.testing.assert_close(results[0], truth[0], rtol=1e-5, atol=1e-5)
    dq, dk, dweight = gradients
    assert not dq[:, [0, 3]].any(), "a head of weight 0 changes nothing"
    for a, b in zip((dq, dk), expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert dweight[:, 0].any()
    moderate = expected[2].abs() < 1e6
    torch.testing.assert_close(dweight[moderate], expected[2][moderate], rtol=1e-4, atol=1e-4)


def test_strided_values_of_another_width() -> None:
    """v as a view of [B, S, H, 2 Dv], g sliced, Dv = 40 beside D = 16."""
    call = cases.call(attention_contribution, torch.float32, CPU, over="columns")
    v = torch.randn(2, cases.KEYS, 2, 80).transpose(1, 2)[..., 40:]
    g = torch.randn(4, 12, 80)[..., :40].transpose(0, 1)
    _same(replace(call, inputs={**call.inputs, "v": v, "g": g}))


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_all_rows_without_a_column(heads: str) -> None:
    """No row sees a key: 0 and no gradient."""
    call = cases.call(attention_kl, torch.float32, CPU, over="columns", heads=heads)
    rows = call.options["rows"]
    none = replace(rows, stop=torch.zeros_like(rows.stop), start=torch.zeros_like(rows.start))
    results, gradients = differentiate(call, backend="triton", rows=none)
    assert not results[0].any() and not any(x.any() for x in gradients)


@pytest.mark.parametrize("over", ["visible", "columns"])
@pytest.mark.parametrize("function", [attention_map, attention_kl])
def test_strided_head_weights_and_targets(function, over: str) -> None:
    """Transposed: every [N, Hq] and [N, C] tensor made of them must be contiguous all the same."""
    call = cases.call(function, torch.float32, CPU, over=over)
    weight = torch.rand(call.inputs["q"].shape[:2])
    inputs = {**call.inputs, "head_weight": weight}
    call = replace(call, inputs=inputs)
    transposed = {
        name: x.t().contiguous().t() if name in ("head_weight", "target") else x
        for name, x in inputs.items()
    }
    strided = replace(call, inputs=transposed)
    results = differentiate(strided, backend="triton"), differentiate(call, backend="triton")
    for ours, plain in zip(*results, strict=True):
        for o, p in zip(ours, plain, strict=True):
            torch.testing.assert_close(o, p, rtol=0, atol=0)


def test_more_splits_than_one_program_merges(monkeypatch) -> None:
    """With as many processors as a GPU has, dq and dg of 20 splits are merged in two rounds."""
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 24), (1, 2, 640, 24), (1, 2, 640, 40), (2, 4, 40))
    q, k, v, g = inputs = [torch.randn(s, generator=draw).requires_grad_() for s in shapes]
    rows = QueryRows.causal(torch.zeros(2), torch.tensor([639, 500]))
    columns, upstream = torch.arange(640).int()[None], torch.randn(2, 640, generator=draw)

    def run(backend: str) -> list[torch.Tensor]:
        found = attention_contribution(q, k, v, g, rows, columns, over="visible", backend=backend)
        return [found, *torch.autograd.grad(found, inputs, upstream)]

    ours, again, truth = run("triton"), run("triton"), run("reference")
    for a, b, expected in zip(ours, again, truth, strict=True):
        assert torch.equal(a, b), "the same bits"
        torch.testing.assert_close(a, expected, rtol=2e-5, atol=2e-5)
    assert not tiles.arrival_counters(torch.device("cpu"), 1).any(), "they are left at 0"
