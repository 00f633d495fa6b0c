"""The Triton kernels at real sizes on a GPU: values, gradients, graph capture, torch.compile."""

import pytest
import torch
from torch import Tensor

from groundkern import KeySets, QueryRows, attention_kl, attention_map, side_attention
from tests.closeness import GRADIENTS, VALUES, assert_close

pytestmark = pytest.mark.gpu

HEADS, DIM, BATCH = (28, 4), 128, 2  # Qwen2.5-VL-7B
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 1024


def _inputs(dtype: torch.dtype, keys: int, n: int) -> dict[str, Tensor]:
    shapes = {"q": (n, HEADS[0], DIM)} | dict.fromkeys("kv", (BATCH, HEADS[1], keys, DIM))
    return {
        name: torch.randn(shape, device="cuda").to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def _rows(keys: int, n: int) -> QueryRows:
    sequence = torch.arange(n, device="cuda") * BATCH // n
    position = keys - 1 - torch.arange(n, device="cuda") % (keys // 2)
    return QueryRows.causal(sequence, position)


def _regions(keys: int, n: int) -> KeySets:
    """Text at both ends, and for each of 8 sets one sixteenth of the image in between."""
    j = torch.arange(keys, device="cuda")
    text = (j < 64) | (j >= keys - keys // 8)
    inside = j[None] // (keys // 16) == torch.arange(8, device="cuda")[:, None]
    index = (torch.arange(n, device="cuda") % 9 - 1).int()
    return KeySets.from_bool(text | inside, index)


def _maps(keys: int, n: int) -> dict[str, object]:
    columns = torch.arange(64, 64 + COLUMNS, dtype=torch.int32, device="cuda")
    return {"rows": _rows(keys, n), "columns": columns.expand(BATCH, -1).contiguous()}


def _differentiate(function, inputs: dict[str, Tensor], options: dict[str, object]):
    """(results, gradients) against uneven upstream gradients, the same for every caller."""
    result = function(**inputs, **options)
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    differentiable = [x for x in inputs.values() if x.requires_grad]
    return results, torch.autograd.grad(results, differentiable, upstream)


def _compare(ours, oracle, inputs: dict[str, Tensor], options: dict[str, object]) -> None:
    """Hold `ours` to the closeness rule: `oracle` in fp64 is the truth, in our dtype the budget."""
    got, got_gradients = _differentiate(ours, inputs, {**options, "backend": "triton"})
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    truth, true_gradients = _differentiate(oracle, wide, options)
    plain, plain_gradients = _differentiate(oracle, inputs, options)
    for i, (o, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert_close(f"result {i}", o, p, t, VALUES)
    names = [name for name, x in inputs.items() if x.requires_grad]
    gradients = zip(names, got_gradients, plain_gradients, true_gradients, strict=True)
    for name, o, p, t in gradients:
        assert_close(f"d{name}", o, p, t, GRADIENTS)


def _attention(q, k, v, rows, allowed=None):
    """Plain torch with full probabilities, one sequence at a time: (out, p, lse)."""
    parts = []
    visible = torch.arange(k.shape[2], device=k.device)
    for b in range(len(k)):
        of_b = rows.sequence == b
        s = torch.einsum("nkgd,ksd->nkgs", q[of_b].unflatten(1, (k.shape[1], -1)), k[b])
        s = s.to(torch.float64 if s.dtype == torch.float64 else torch.float32) * q.shape[2] ** -0.5
        kept = (visible >= rows.start[of_b, None]) & (visible < rows.stop[of_b, None])
        if allowed is not None:
            index = allowed.index[of_b]
            kept = kept & (allowed.to_bool()[index.clamp(min=0).long()] | (index < 0)[:, None])
        s = s.masked_fill(~kept[:, None, None], -torch.inf)
        p = s.softmax(-1)
        out = None if v is None else torch.einsum("nkgs,ksd->nkgd", p.to(q.dtype), v[b])
        parts.append((out, p.flatten(1, 2), s.logsumexp(-1)))
    outs, p, lse = zip(*parts, strict=True)
    out = None if v is None else torch.cat(outs).flatten(1, 2)
    return out, torch.cat(p), torch.cat(lse).flatten(1, 2)


def _plain_side_attention(q, k, v, rows, allowed=None):
    out, _, lse = _attention(q, k, v, rows, allowed)
    return out, lse


def _plain_map(q, k, rows, columns, over):
    """Every column is every row's own here."""
    _, p, _ = _attention(q, k, None, rows)
    p = p[..., columns[0].long()]
    return (p if over == "visible" else p / p.sum(-1, keepdim=True)).mean(1)


def _plain_kl(q, k, target, rows, columns, over):
    target = target / target.sum(-1, keepdim=True)
    return (target * (target.log() - _plain_map(q, k, rows, columns, over).log())).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 64, 256])
@pytest.mark.parametrize("keys", [4096, 32768, 131072])
@pytest.mark.parametrize("sets", [False, True], ids=["visible", "regions"])
def test_side_attention(sets: bool, keys: int, n: int, dtype: torch.dtype) -> None:
    options = {"rows": _rows(keys, n), "allowed": _regions(keys, n) if sets else None}
    _compare(side_attention, _plain_side_attention, _inputs(dtype, keys, n), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 64, 256])
@pytest.mark.parametrize("keys", [4096, 32768, 131072])
@pytest.mark.parametrize("over", ["visible", "columns"])
def test_attention_map_and_kl(over: str, keys: int, n: int, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype, keys, n)
    del inputs["v"]
    options = {**_maps(keys, n), "over": over}
    _compare(attention_map, _plain_map, inputs, options)
    target = torch.rand(n, COLUMNS, device="cuda")
    _compare(attention_kl, _plain_kl, {**inputs, "target": target}, options)


@pytest.mark.parametrize("dim", [16, 72, 80, 96, 256])
def test_head_dimensions(dim: int) -> None:
    """Off the powers of two, and the smallest and largest."""
    n, keys = 8, 4096
    inputs = {
        "q": torch.randn(n, 4, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    } | {
        name: torch.randn(BATCH, 2, keys, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for name in "kv"
    }
    _compare(side_attention, _plain_side_attention, inputs, {"rows": _rows(keys, n)})


def test_shared_statistics_never_change_the_result() -> None:
    inputs = _inputs(torch.bfloat16, 4096, 64)
    rows, sets = _rows(4096, 64), _regions(4096, 64)
    lse = side_attention(**inputs, rows=rows, backend="triton").lse
    for shift in (0.0, 200.0):  # as it is, and so far above that every sum underflows
        options = {"rows": rows, "allowed": sets, "backend": "triton"}
        given, _ = _differentiate(side_attention, inputs, {**options, "lse": lse.detach() + shift})
        own, _ = _differentiate(side_attention, inputs, options)
        for a, b in zip(given, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("function", [side_attention, attention_map], ids=lambda f: f.__name__)
def test_capture_in_a_cuda_graph(function) -> None:
    inputs = _inputs(torch.bfloat16, 4096, 64)
    options = {"rows": _rows(4096, 64), "allowed": _regions(4096, 64)}
    if function is attention_map:
        del inputs["v"]
        options = {**_maps(4096, 64), "over": "visible"}
    options["backend"] = "triton"

    def step() -> tuple[Tensor, ...]:
        result = function(**inputs, **options)
        result = result if isinstance(result, Tensor) else result.out
        return (result, *torch.autograd.grad(result.float().square().sum(), list(inputs.values())))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_compiled_equals_eager() -> None:
    inputs = _inputs(torch.bfloat16, 4096, 8)
    options = {"rows": _rows(4096, 8), "allowed": _regions(4096, 8), "backend": "triton"}
    eager, gradients = _differentiate(side_attention, inputs, options)
    compiled = torch.compile(side_attention, fullgraph=True)
    results, compiled_gradients = _differentiate(compiled, inputs, options)
    for a, b in zip((*eager, *gradients), (*results, *compiled_gradients), strict=True):
        assert torch.equal(a, b)
