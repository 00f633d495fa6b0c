"""The specification of side attention, in plain torch.

(S1)  Omega_t = {start_t <= j < stop_t : j in the row's key set}
      s_tj  = softcap(scale q_t . k_j)
      lse_t = log sum_{j in Omega_t} exp(s_tj)
      out_t = sum_{j in Omega_t} exp(s_tj - lse_t) v_j
      Omega_t empty: out_t = 0, lse_t = -inf, no gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from groundkern.calls import Call
from groundkern.ops.side_attention import Inputs, Options, Outputs, Upstream
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import row_blocks, scores, vjp


def _block(q: Tensor, k: Tensor, v: Tensor, *, keys: Tensor, options: Options):
    """Rows of one sequence: q [n, Hq, D], k [Hkv, S, D], v [Hkv, S, Dv], keys bool [n, S]."""
    empty = ~keys.any(-1)  # [n]
    blocked = ~(keys | empty[:, None])  # an empty row attends everywhere; masked out below
    s = scores(q, k, *options).masked_fill(blocked[:, None], -torch.inf)  # [n, Hq, S]
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp().unflatten(1, (k.shape[0], -1))  # [n, Hkv, Hq / Hkv, S]
    out = torch.einsum("nkgs,ksd->nkgd", p, v).flatten(1, 2)  # [n, Hq, Dv]
    return (
        out.masked_fill(empty[:, None, None], 0.0),
        lse.masked_fill(empty[:, None], -torch.inf),
    )


def forward(inputs: Inputs, call: Call) -> Outputs:
    """The given lse is only a shift and is not needed here."""
    q, k, v, _ = inputs
    wide = accumulation_dtype(q.dtype)
    out = q.new_zeros(*q.shape[:2], v.shape[3])
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    for b, rows, block in _blocks(inputs, call):
        out[rows], lse[rows] = block(*(x.to(wide) for x in (q[rows], k[b], v[b])))
    return Outputs(out, lse, q.new_empty(0))


def backward(
    upstream: Upstream, inputs: Inputs, outputs: Outputs, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by autograd on `_block`; `outputs` are for backends that reuse them."""
    q, k, v, _ = inputs
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    for b, rows, block in _blocks(inputs, call):
        parts = [x.to(wide) for x in (q[rows], k[b], v[b])]
        gradients = vjp(block, parts, [x[rows].to(wide) for x in upstream])
        dq[rows] = gradients[0]
        dk[b] += gradients[1]
        dv[b] += gradients[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _blocks(inputs: Inputs, call: Call) -> Iterator[tuple[int, slice, Callable]]:
    """Yield (b, rows, function of their q, k[b] and v[b])."""
    (q, k, *_), selection = inputs, call.selection
    for b, rows in row_blocks(selection.sequence, k.shape[0], q.shape[1] * k.shape[2]):
        keys = selection.allowed(rows, k.shape[2])
        yield b, rows, partial(_block, keys=keys, options=call.options)
