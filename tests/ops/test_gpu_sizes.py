"""On a GPU: tensors beyond 2^31 elements, the host that never waits, capture of whole steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from groundkern import (
    KeySets,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    linear_cross_entropy,
    set_logit_budget,
    side_attention,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LONG, KV_HEADS, HEADS, DIM = 2**21 + 96, 8, 16, 128  # 8 x LONG x 128 > 2^31


def _long_inputs() -> tuple[Tensor, Tensor, Tensor, QueryRows]:
    """k and v whose last head lies beyond 2^31; rows at both ends of the sequence."""
    q = torch.randn(4, HEADS, DIM, device=CUDA, dtype=torch.bfloat16)
    k, v = (
        torch.randn(1, KV_HEADS, LONG, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2)
    )
    assert k.numel() > 2**31
    last = torch.tensor([5, 900, LONG - 2, LONG - 1], device=CUDA)
    rows = QueryRows.causal(torch.zeros_like(last), last, window=1000)
    return *(x.requires_grad_() for x in (q, k, v)), rows


def _windows(x: Tensor, rows: QueryRows) -> list[Tensor]:
    """The keys each row sees, [Hkv, w, D] of x [1, Hkv, S, D]."""
    bounds = zip(rows.start.tolist(), rows.stop.tolist(), strict=True)
    return [x[0, :, a:b] for a, b in bounds]


def test_side_attention_beyond_2_to_the_31() -> None:
    q, k, v, rows = _long_inputs()
    out, lse = side_attention(q, k, v, rows, backend="triton")
    plain = []
    for n, (keys, values) in enumerate(zip(_windows(k, rows), _windows(v, rows), strict=True)):
        s = q[n].float().unflatten(0, (KV_HEADS, -1)) @ keys.float().transpose(1, 2) * DIM**-0.5
        plain.append((s.softmax(-1) @ values.float()).flatten(0, 1))
    torch.testing.assert_close(out.float(), torch.stack(plain), rtol=2e-2, atol=2e-3)
    assert lse.isfinite().all()
    upstream = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    expected = torch.autograd.grad(torch.stack(plain), (q, k, v), upstream.float())
    for got, wanted in zip((dq, dk, dv), expected, strict=True):
        assert (got - wanted).abs().max() <= 3e-2 * wanted.abs().max()
        if got is not dq:
            assert not got[:, :, 1000 : LONG - 2000].any(), "keys no row sees"


def test_maps_beyond_2_to_the_31() -> None:
    q, k, _, rows = _long_inputs()
    columns = torch.tensor([[3, 700, LONG - 500, LONG - 3]], dtype=torch.int32, device=CUDA)
    maps = attention_map(q, k, rows, columns, over="visible", backend="triton")
    plain = torch.zeros_like(maps)
    for n, keys in enumerate(_windows(k, rows)):
        s = q[n].float().unflatten(0, (KV_HEADS, -1)) @ keys.float().transpose(1, 2) * DIM**-0.5
        p = s.softmax(-1).flatten(0, 1).mean(0)
        for c, j in enumerate(columns[0].tolist()):
            if int(rows.start[n]) <= j < int(rows.stop[n]):
                plain[n, c] = p[j - int(rows.start[n])]
    torch.testing.assert_close(maps, plain, rtol=1e-3, atol=1e-6)
    (dk,) = torch.autograd.grad(maps.sum(), k)
    assert dk.isfinite().all() and dk[0, -1, LONG - 3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_beyond_2_to_the_31(dtype: torch.dtype) -> None:
    """One chunk of them against many."""
    rows, words, dim = 16_384, 151_936, 256
    assert rows * words > 2**31
    hidden = torch.randn(rows, dim, device=CUDA).to(dtype).requires_grad_()
    weight = (torch.randn(words, dim, device=CUDA) * dim**-0.5).to(dtype).requires_grad_()
    target = torch.randint(words, (rows,), device=CUDA)

    def run(budget: int | None) -> tuple[Tensor, ...]:
        set_logit_budget(budget)
        try:
            result = linear_cross_entropy(hidden, weight, target, backend="triton")
            return (*result, *torch.autograd.grad(result.loss, (hidden, weight)))
        finally:
            set_logit_budget(None)

    for a, b in zip(run(2**36), run(None), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-6)
        else:
            assert torch.equal(a, b)


N, KEYS, COLUMNS = 64, 4096, 1024


def _steps() -> dict[str, tuple]:
    """name -> (function, differentiable inputs, other arguments)."""
    q, g = (torch.randn(N, 28, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 4, KEYS, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    position = torch.arange(KEYS - N, KEYS, device=CUDA)
    rows = QueryRows.causal(torch.zeros_like(position), position)
    visual = torch.arange(KEYS, device=CUDA)[None] < 3000
    index = torch.zeros(N, dtype=torch.int32, device=CUDA)
    sets = KeySets.from_bool(~visual | (torch.arange(KEYS, device=CUDA) < 20), index)
    columns = torch.arange(COLUMNS, dtype=torch.int32, device=CUDA)[None]
    target = torch.rand(N, COLUMNS, device=CUDA)
    here = {"rows": rows, "columns": columns}
    return {
        "side_attention": (
            side_attention,
            {"q": q, "k": k, "v": v},
            {"rows": rows, "allowed": sets},
        ),
        "attention_map": (attention_map, {"q": q, "k": k}, {**here, "over": "visible"}),
        "attention_contribution": (
            attention_contribution,
            {"q": q, "k": k, "v": v, "g": g},
            {**here, "over": "columns"},
        ),
        **{
            f"attention_kl_{heads}_{over}": (
                attention_kl,
                {"q": q, "k": k},
                {**here, "target": target, "over": over, "heads": heads},
            )
            for heads in ("mean", "each")
            for over in ("visible", "columns")
        },
        "linear_cross_entropy": (
            linear_cross_entropy,
            {"hidden": q.flatten(1), "weight": torch.randn(32_064, 28 * DIM).to(q)},
            {"target": torch.randint(32_064, (N,), device=CUDA)},
        ),
    }


NAMES = (
    "side_attention",
    "attention_map",
    "attention_contribution",
    *(f"attention_kl_{h}_{o}" for h in ("mean", "each") for o in ("visible", "columns")),
    "linear_cross_entropy",
)


def _step(name: str):
    """A function that makes the result and the gradients."""
    function, inputs, options = _steps()[name]
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}

    def run() -> tuple[Tensor, ...]:
        result = function(**leaves, **options, backend="triton")
        result = result if isinstance(result, Tensor) else result[0]
        gradients = torch.autograd.grad(result.float().square().sum(), list(leaves.values()))
        return result.detach(), *gradients

    return run


@contextmanager
def _no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits(name: str) -> None:
    run = _step(name)
    run()  # compiles
    with _no_sync():
        run()


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_are_captured_in_a_graph(name: str) -> None:
    run = _step(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
