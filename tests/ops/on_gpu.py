"""What the GPU tests share: inputs of real size, an oracle that needs little memory, CUDA graphs.

Eight pytest processes may share one card, so a test that is not marked `gpu_large` stays within
about 6 GiB: the oracle computes one block of rows at a time (a result depends on its own row only)
and sums the gradients of keys and values over the blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from groundkern import KeySets, QueryRows
from tests.closeness import GRADIENTS, VALUES, assert_close

CUDA = torch.device("cuda")
HEADS, DIM, BATCH = (28, 4), 128, 2  # Qwen2.5-VL-7B
COLUMNS = 1024
BLOCK = 2**24  # scores of the oracle alive at a time, 128 MiB in fp64

large = pytest.mark.gpu_large
Block = Callable[[dict[str, Tensor], Tensor, dict[str, object]], tuple[Tensor, ...]]


def attention_inputs(
    dtype: torch.dtype, keys: int, n: int, names: str = "qkv"
) -> dict[str, Tensor]:
    of_row, of_key = (n, HEADS[0], DIM), (BATCH, HEADS[1], keys, DIM)
    shapes = {name: of_row if name in "qg" else of_key for name in names}
    return {name: torch.randn(shape, device=CUDA).to(dtype) for name, shape in shapes.items()}


def attention_rows(keys: int, n: int) -> QueryRows:
    """Rows of both sequences, at positions in the second half of the keys."""
    sequence = torch.arange(n, device=CUDA) * BATCH // n
    position = keys - 1 - torch.arange(n, device=CUDA) % (keys // 2)
    return QueryRows.causal(sequence, position)


def regions(keys: int, n: int) -> KeySets:
    """8 sets: each has the text at both ends and one sixteenth of the keys."""
    j = torch.arange(keys, device=CUDA)
    text = (j < 64) | (j >= keys - keys // 8)
    inside = j[None] // (keys // 16) == torch.arange(8, device=CUDA)[:, None]
    index = (torch.arange(n, device=CUDA) % 9 - 1).int()
    return KeySets.from_bool(text | inside, index)


def map_options(keys: int, n: int, over: str) -> dict[str, object]:
    """1024 columns, all of which every row sees."""
    columns = torch.arange(64, 64 + COLUMNS, dtype=torch.int32, device=CUDA)
    columns = columns.expand(BATCH, -1).contiguous()
    return {"rows": attention_rows(keys, n), "columns": columns, "over": over}


def _scores(x: dict[str, Tensor], allowed: Tensor) -> Tensor:
    """[n, Hkv, group, S] of q [n, Hq, D] and the keys of one sequence."""
    q, k = x["q"], x["k"]
    s = torch.einsum("nkgd,ksd->nkgs", q.unflatten(1, (len(k), -1)), k)
    s = s.to(torch.float64 if s.dtype == torch.float64 else torch.float32) * q.shape[2] ** -0.5
    return s.masked_fill(~allowed[:, None, None], -torch.inf)


def plain_side(x: dict[str, Tensor], allowed: Tensor, _) -> tuple[Tensor, ...]:
    s = _scores(x, allowed)
    out = torch.einsum("nkgs,ksd->nkgd", s.softmax(-1).to(x["q"].dtype), x["v"])
    return out.flatten(1, 2), s.logsumexp(-1).flatten(1, 2)


def plain_map(
    x: dict[str, Tensor], allowed: Tensor, options: dict[str, object]
) -> tuple[Tensor, ...]:
    """Here every row owns every column."""
    p = _scores(x, allowed).softmax(-1)[..., options["columns"][0].long()].flatten(1, 2)
    return ((p if options["over"] == "visible" else p / p.sum(-1, keepdim=True)).mean(1),)


def plain_kl(
    x: dict[str, Tensor], allowed: Tensor, options: dict[str, object]
) -> tuple[Tensor, ...]:
    target = x["target"] / x["target"].sum(-1, keepdim=True)
    (p,) = plain_map(x, allowed, options)
    return ((torch.xlogy(target, target) - target * p.log()).sum(-1),)  # some targets are 0


def _allowed(options: dict[str, object], block: slice, keys: int) -> Tensor:
    """bool [n, S]"""
    rows, allowed = options["rows"], options.get("allowed")
    j = torch.arange(keys, device=CUDA)
    usable = (j >= rows.start[block, None]) & (j < rows.stop[block, None])
    if allowed is not None:
        index = allowed.index[block]
        usable = usable & (allowed.to_bool()[index.clamp(min=0).long()] | (index < 0)[:, None])
    return usable


def oracle(
    function: Block,
    inputs: dict[str, Tensor],
    options: dict[str, object],
    upstream: list[Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Plain torch with full probabilities, in fp64 if `dtype` is that: (results, gradients).

    The gradients of keys and values are summed over blocks in fp32 or better.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: t.to(dtype or t.dtype) for name, t in inputs.items()}
    sums = {name: torch.zeros_like(t, dtype=wide) for name, t in x.items() if name != "target"}
    (_, heads, _), keys = x["q"].shape, x["k"].shape[2]
    height, parts = max(1, BLOCK // (heads * keys)), []
    last = options["rows"].sequence.bincount(minlength=len(x["k"])).cumsum(0).tolist()
    for b, end in enumerate(last):
        for start in range(last[b - 1] if b else 0, end, height):
            block = slice(start, min(start + height, end))
            at = {name: b if name in "kv" else block for name in x}
            leaves = {name: t[at[name]].detach() for name, t in x.items()}
            wanted = [leaves[name].requires_grad_() for name in sums]
            results = function(leaves, _allowed(options, block, keys), options)
            into = [u[block].to(r) for u, r in zip(upstream, results, strict=True)]
            for name, d in zip(sums, torch.autograd.grad(results, wanted, into), strict=True):
                sums[name][at[name]] += d
            parts.append([r.detach() for r in results])
    return [torch.cat(p) for p in zip(*parts, strict=True)], sums


def compare(
    ours: Callable, function: Block, inputs: dict[str, Tensor], options: dict[str, object], **only
) -> None:
    """Hold `ours` to the closeness rule: the oracle in fp64 is the truth, in our dtype the budget.

    only: arguments that are not passed to the oracle.
    """
    leaves = {n: x.detach().requires_grad_(n != "target") for n, x in inputs.items()}
    results = ours(**leaves, **options, **only, backend="triton")
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    draw = torch.Generator().manual_seed(5)
    upstream = [torch.randn(r.shape, generator=draw).to(r) for r in results]
    names = [name for name, x in leaves.items() if x.requires_grad]
    gradients = torch.autograd.grad(results, [leaves[n] for n in names], upstream)
    truth, true_gradients = oracle(function, inputs, options, upstream, torch.float64)
    plain, plain_gradients = oracle(function, inputs, options, upstream)
    for i, (o, p, t) in enumerate(zip(results, plain, truth, strict=True)):
        assert_close(f"result {i}", o, p, t, VALUES)
    for name, d in zip(names, gradients, strict=True):
        p, t = plain_gradients[name], true_gradients[name]
        assert_close(f"d{name}", d, p.to(d.dtype), t, GRADIENTS)


def assert_same_predictions(
    a: Tensor, b: Tensor, hidden: Tensor, weight: Tensor, apart: float = 1e-5
) -> None:
    """Likeliest ids [N] of two GEMMs, which may sum in different orders: they may differ in rows
    whose two highest logits are closer than rounding, `apart`."""
    differing = (a != b).nonzero()[:, 0]
    if not len(differing):
        return
    ids = torch.stack([a[differing], b[differing]], 1)  # [n, 2]
    logits = torch.einsum("nd,ncd->nc", hidden[differing].double(), weight[ids].double())
    gap = (logits[:, 0] - logits[:, 1]).abs()
    assert (gap < apart).all(), f"rows {differing.tolist()}: logits {logits.tolist()}"


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise if anything makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(
    step: Callable[[], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Callable[[], None]]:
    """(results outside a CUDA graph, results inside it, a function that replays it)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outside = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = step()
    return outside, inside, graph.replay
