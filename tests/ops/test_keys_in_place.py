"""Keys that lie next to each other are multiplied where they are, others are gathered first: the
CPU's kernels give the same bits either way. (fp32 gathers all, and so does a CPU without bf16
products; the comparison with plain torch holds everywhere.)"""

import pytest
import torch
from torch import Tensor

from groundkern import (
    KeySets,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    available_backends,
    side_attention,
)
from groundkern.ops.cases import Call
from tests.ops.test_contract import BESIDES, hold

NATIVE = available_backends()["native"]
pytestmark = pytest.mark.skipif(NATIVE is not None, reason=NATIVE or "")

BF16 = torch.bfloat16
SEQUENCES, HEADS, KV_HEADS, DIM = 2, 4, 2, 24
# Used keys 0 to 63 and 128 to 191 lie next to each other; 64 to 127 and the last nine do not fill a
# part of 64 that does.
PLACES = torch.cat(
    [torch.arange(3, 67), 80 + 2 * torch.arange(64), 300 + torch.arange(64), 400 + torch.arange(9)]
)
ROWS = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)


def _scattered(spread: int, x: Tensor) -> Tensor:
    """x [B, H, used keys, D] among others that are NaN, at `spread` times PLACES."""
    keys = torch.full((*x.shape[:2], spread * 410, x.shape[3]), torch.nan, dtype=x.dtype)
    keys[:, :, spread * PLACES] = x
    return keys


def _results(name: str, spread: int, cap: float | None) -> list[Tensor]:
    """Results and gradients of the used keys."""
    torch.manual_seed(0)
    keys = spread * 410
    drawn = [torch.randn(SEQUENCES, KV_HEADS, len(PLACES), DIM).to(BF16) for _ in range(2)]
    k, v = (_scattered(spread, x).requires_grad_() for x in drawn)
    q, g = (torch.randn(len(ROWS), HEADS, DIM).to(BF16).requires_grad_() for _ in range(2))
    stop = spread * torch.tensor([410, 350, 70, 410, 4], dtype=torch.int32)
    rows = QueryRows(ROWS, stop - 1, torch.zeros_like(stop), stop)
    used = torch.zeros(1, keys, dtype=torch.bool)
    used[:, spread * PLACES] = True
    columns = (spread * PLACES).to(torch.int32).expand(SEQUENCES, -1)
    options = {"softcap": cap, "backend": "native"}
    if name == "side_attention":
        sets = KeySets.from_bool(used, torch.zeros(len(ROWS), dtype=torch.int32))
        results, inputs = side_attention(q, k, v, rows, allowed=sets, **options), (q, k, v)
    elif name == "attention_map":
        results = (attention_map(q, k, rows, columns, over="columns", **options),)
        inputs = (q, k)
    elif name == "attention_contribution":
        results = (attention_contribution(q, k, v, g, rows, columns, over="columns", **options),)
        inputs = (q, k, v, g)
    else:
        target = torch.rand(len(ROWS), len(PLACES))
        results = (attention_kl(q, k, target, rows, columns, over="columns", **options),)
        inputs = (q, k)
    upstream = [torch.randn(x.shape).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, inputs, upstream)
    at = spread * PLACES
    return [*results, *(x[:, :, at] if x.dim() == 4 else x for x in gradients)]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(
    "name", ["side_attention", "attention_map", "attention_contribution", "attention_kl"]
)
def test_keys_next_to_each_other_and_apart_give_the_same_bits(name: str, cap: float | None) -> None:
    near, far = _results(name, 1, cap), _results(name, 3, cap)
    assert all(x.isfinite().all() for x in near)
    for a, b in zip(near, far, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 24), (torch.float16, 24), (BF16, 24), (BF16, 7)],  # an odd width is gathered
    ids=str,
)
@pytest.mark.parametrize("over", ["visible", "columns"])
def test_many_keys_of_strided_memory_hold_the_rule(over: str, dtype: torch.dtype, dim: int) -> None:
    """As a model keeps them: [B, S, H, D] in memory."""
    keys = 200
    k, v = (torch.randn(SEQUENCES, keys, KV_HEADS, dim).to(dtype).transpose(1, 2) for _ in range(2))
    q = torch.randn(len(ROWS), HEADS, dim).to(dtype)
    stop = torch.tensor([200, 131, 64, 200, 1], dtype=torch.int32)
    rows = QueryRows(ROWS, stop - 1, torch.zeros_like(stop), stop)
    columns = torch.arange(4, 196, dtype=torch.int32).expand(SEQUENCES, -1)
    target = torch.rand(len(ROWS), columns.shape[1])
    given = {"rows": rows, "columns": columns, "over": over}
    for call in (
        Call(side_attention, {"q": q, "k": k, "v": v}, {"rows": rows}, differentiable=2),
        Call(attention_map, {"q": q, "k": k}, given),
        Call(attention_contribution, {"q": q, "k": k, "v": v, "g": q.flip(0)}, given),
        Call(attention_kl, {"q": q, "k": k}, {"target": target, **given}),
    ):
        hold(call, "native", dtype, besides=BESIDES)
