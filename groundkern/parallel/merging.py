"""Attention over the keys of several ranks, merged by the log-sum-exp of each.

(P1)  lse_n = log sum_r exp(lse_rn)                     lse_r of the keys of rank r alone
      w_rn  = exp(lse_rn - lse_n)                       the share of the mass that rank r has
(P2)  out_n = sum_r w_rn out_rn

Backward, with the gradients dout and dlse of the results:
      d out_rn = w_rn dout_n
      d lse_rn = w_rn (dlse_n + dout_n . (out_rn - out_n))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groundkern.once import once
from groundkern.parallel.collectives import Exchange, from_all, sent_home, sent_to_all, summed


def merged_attention(out: Tensor, lse: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Side attention [N, Hq, Dv], [N, Hq] over each rank's keys -> over all keys, of this rank's
    rows [N_r, Hq, Dv], [N_r, Hq]."""
    return _MergedAttention.apply(out, lse, exchange)


def merged_lse(lse: Tensor, exchange: Exchange) -> Tensor:
    """[N, Hq] of each rank's keys -> of all keys, on all ranks (P1)."""
    return _MergedLse.apply(lse, exchange)


def _share(lse: Tensor, merged: Tensor) -> Tensor:
    """w of (P1); 0 in a row without keys."""
    return (lse - torch.where(merged == -torch.inf, 0.0, merged)).exp()


class _MergedAttention(torch.autograd.Function):
    """One backward for both results: it runs, and sends the same, whichever of them is used."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        outs, lses = sent_home([out, lse], exchange)  # [ranks, N_r, Hq, Dv], [ranks, N_r, Hq]
        merged = lses.logsumexp(0)
        exact = (_share(lses, merged)[..., None] * outs).sum(0)  # in lse's dtype
        ctx.save_for_backward(out, lse, exact, merged)
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        return exact.to(out.dtype), merged

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, None]:
        out, lse, exact, merged = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(out, lse, exact, merged, dout, dlse, ctx.exchange)
        return *once("merged_attention", found, (out, lse)), None


class _MergedLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, exchange: Exchange) -> Tensor:
        merged = from_all(lse, exchange.shard).logsumexp(0)
        ctx.save_for_backward(lse, merged)
        ctx.exchange = exchange
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        lse, merged = ctx.saved_tensors
        with torch.no_grad():
            share = _share(lse, merged)
            total = summed(gradient, ctx.exchange.shard)
            found = (share * total).masked_fill(share == 0, 0.0)
        return *once("merged_lse", [found], [lse]), None


def _gradients(
    out: Tensor,
    lse: Tensor,
    exact: Tensor,
    merged: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """Those of `merged_attention`, of out and lse (P2)."""
    dout = exact.new_zeros(exact.shape, dtype=out.dtype) if dout is None else dout
    dlse = torch.zeros_like(merged) if dlse is None else dlse
    rest = dlse - (dout * exact).sum(-1)
    dout, rest, merged = sent_to_all([dout, rest, merged], exchange)  # of all N rows
    share = _share(lse, merged)
    along = (dout * out.to(lse.dtype)).sum(-1)
    none = share == 0  # a rank without keys of the row, which may be NaN upstream
    d_out = (share[..., None] * dout).masked_fill(none[..., None], 0.0)
    d_lse = (share * (along + rest)).masked_fill(none, 0.0)
    return d_out.to(out.dtype), d_lse
