"""The specification of side attention, in plain torch.

(S1)  Omega_t = {start_t <= j < stop_t : j in the row's key set}
      s_tj  = softcap(scale q_t . k_j)
      lse_t = log sum_{j in Omega_t} exp(s_tj)
      out_t = sum_{j in Omega_t} exp(s_tj - lse_t) v_j
      Omega_t empty: out_t = 0, lse_t = -inf, no gradient.
"""

from functools import partial

import torch
from torch import Tensor

from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import row_blocks, scores, vjp
from groundkern.selection import keys_of_rows


def _block(q: Tensor, k: Tensor, v: Tensor, *, keys: Tensor, scale: float, softcap: float):
    """Rows of one sequence: q [n, Hq, D], k [Hkv, S, D], v [Hkv, S, Dv], keys bool [n, S]."""
    empty = ~keys.any(-1)  # [n]
    blocked = ~(keys | empty[:, None])  # an empty row attends everywhere, and is masked out below
    s = scores(q, k, scale, softcap).masked_fill(blocked[:, None], -torch.inf)  # [n, Hq, S]
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp().unflatten(1, (k.shape[0], -1))  # [n, Hkv, Hq / Hkv, S]
    out = torch.einsum("nkgs,ksd->nkgd", p, v).flatten(1, 2)  # [n, Hq, Dv]
    return (
        out.masked_fill(empty[:, None, None], 0.0),
        lse.masked_fill(empty[:, None], -torch.inf),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, Dv] in q's dtype and lse [N, Hq]; the given lse, only a shift, is not needed."""
    wide = accumulation_dtype(q.dtype)
    out = q.new_zeros(*q.shape[:2], v.shape[3])
    own_lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    for b, rows in row_blocks(sequence, k.shape[0], q.shape[1] * k.shape[2]):
        keys = keys_of_rows(start[rows], stop[rows], words, set_index, rows, k.shape[2])
        block = partial(_block, keys=keys, scale=scale, softcap=softcap)
        out[rows], own_lse[rows] = block(*(x.to(wide) for x in (q[rows], k[b], v[b])))
    return out, own_lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    own_lse: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by autograd on `_block`; `out` and `own_lse` are for backends that reuse them."""
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    for b, rows in row_blocks(sequence, k.shape[0], q.shape[1] * k.shape[2]):
        keys = keys_of_rows(start[rows], stop[rows], words, set_index, rows, k.shape[2])
        block = partial(_block, keys=keys, scale=scale, softcap=softcap)
        inputs = [x.to(wide) for x in (q[rows], k[b], v[b])]
        gradients = vjp(block, inputs, (dout[rows].to(wide), dlse[rows].to(wide)))
        dq[rows] = gradients[0]
        dk[b] += gradients[1]
        dv[b] += gradients[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
