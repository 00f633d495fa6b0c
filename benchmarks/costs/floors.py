"""What no implementation can avoid: floating-point operations, memory traffic, the GEMMs.

Computed from sizes alone. Keys are those that at least one row uses, because a matrix unit works on
whole tiles of rows. Every input is read once and every output written once per pass; probabilities,
logits and masks cost nothing. "full" is forward and backward.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["forward", "full"]


@dataclass(frozen=True)
class Floor:
    """flops: operations of the matrix products. bytes: read plus written. gemms: each product as
    (batch, m, n, k)."""

    bytes: int
    gemms: tuple[tuple[int, int, int, int], ...]

    @property
    def flops(self) -> int:
        return sum(2 * b * m * n * k for b, m, n, k in self.gemms)

    def seconds(self, bandwidth: float, matmul_rate: float) -> float:
        """The larger of the two times, with measured ceilings in bytes/s and FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / matmul_rate)


@dataclass(frozen=True)
class AttentionSizes:
    """A few rows against the keys of one sequence.

    rows, heads, kv_heads, dim, value_dim: N, Hq, Hkv, D, Dv. keys: S, all keys, which dk and dv
    span. used: keys that some row may use. columns: C of a map. itemsize: bytes of q's dtype.
    """

    rows: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    keys: int
    used: int
    itemsize: int
    columns: int = 0


def _products(batch: int, rows: int, keys: int, dim: int):
    """x y^T [rows, keys], and the two products of its backward: z y [rows, dim] and z^T x [keys,
    dim]."""
    return (batch, rows, keys, dim), (batch, rows, dim, keys), (batch, keys, dim, rows)


def side_attention(s: AttentionSizes, mode: Mode) -> Floor:
    """Forward: q k^T, p v. Backward: q k^T again, do v^T, p^T do, ds k, ds^T q; dk, dv over S."""
    packed = s.rows * s.heads // s.kv_heads
    scores, dq, dk = _products(s.kv_heads, packed, s.used, s.dim)
    dp, out_gemm, dv = _products(s.kv_heads, packed, s.used, s.value_dim)
    statistics = 4 * s.rows * s.heads
    q, out = s.rows * s.heads * s.dim, s.rows * s.heads * s.value_dim
    used = s.kv_heads * s.used * (s.dim + s.value_dim)
    whole = s.kv_heads * s.keys * (s.dim + s.value_dim)
    forward = s.itemsize * (q + used + out) + statistics
    if mode == "forward":
        return Floor(forward, (scores, out_gemm))
    backward = s.itemsize * (q + used + 2 * out + q + whole) + statistics
    return Floor(forward + backward, (scores, out_gemm, scores, dp, dv, dq, dk))


def attention_map(
    s: AttentionSizes, mode: Mode, *, per_row: bool = False, contribution: bool = False
) -> Floor:
    """Forward: q k^T. Backward: q k^T again, ds k, ds^T q; dk over S.

    per_row: the result is [N] and a [N, C] target is read (`attention_kl`). contribution: v . g on
    the columns too, and in the backward once more, with dg and dv.
    """
    packed = s.rows * s.heads // s.kv_heads
    scores, dq, dk = _products(s.kv_heads, packed, s.used, s.dim)
    q = s.rows * s.heads * s.dim
    result = 4 * s.rows * (1 if per_row else s.columns)
    target = 4 * s.rows * s.columns if per_row else 0
    used, whole = s.kv_heads * s.used * s.dim, s.kv_heads * s.keys * s.dim
    forward = s.itemsize * (q + used) + result + target
    backward = s.itemsize * (q + used + q + whole) + result + target
    gemms, backward_gemms = (scores,), (scores, dq, dk)
    if contribution:
        values, dg, dv = _products(s.kv_heads, packed, s.columns, s.value_dim)
        g = s.rows * s.heads * s.value_dim
        columns = s.kv_heads * s.columns * s.value_dim
        forward += s.itemsize * (g + columns)
        backward += s.itemsize * (2 * g + columns + s.kv_heads * s.keys * s.value_dim)
        gemms, backward_gemms = (scores, values), (scores, dq, dk, values, dg, dv)
    if mode == "forward":
        return Floor(forward, gemms)
    return Floor(forward + backward, gemms + backward_gemms)


def linear_cross_entropy(
    *, rows: int, counted: int, dim: int, vocabulary: int, itemsize: int, mode: Mode, trained: bool
) -> Floor:
    """Logits; dh, which reads W again; dW if the head is trained. Counted rows only."""
    weight, hidden = itemsize * vocabulary * dim, itemsize * counted * dim
    forward = weight + hidden
    logits = (1, counted, vocabulary, dim)
    if mode == "forward":
        return Floor(forward, (logits,))
    gemms = (logits, (1, counted, dim, vocabulary))
    total = forward + weight + itemsize * rows * dim  # dh has ignored rows too
    if trained:
        gemms += ((1, vocabulary, dim, counted),)
        total += hidden + weight
    return Floor(total, gemms)


def plain_gemms(floor: Floor, dtype: torch.dtype, device: torch.device):
    """A function that runs the floor's matrix products on random data."""
    made: dict[tuple[int, int, int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for b, m, n, k in floor.gemms:
        if (b, m, n, k) not in made:
            x = torch.randn(b, m, k, device=device, dtype=dtype)
            y = torch.randn(b, n, k, device=device, dtype=dtype).transpose(1, 2)
            made[b, m, n, k] = (x, y, torch.empty(b, m, n, device=device, dtype=dtype))

    def run() -> tuple[Tensor, ...]:
        for shape in floor.gemms:
            x, y, z = made[shape]
            torch.bmm(x, y, out=z)
        return ()

    return run
