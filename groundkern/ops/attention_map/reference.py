"""The specification of attention maps, contributions and their KL, in plain torch.

       own_tc: column c of the row's sequence is a key that the row may use
(K1)   p_thc = exp(s_thc - norm_th) on own columns, else 0
       norm_th: log-sum-exp over the own columns (over="columns") or all visible keys ("visible")
(K2)   M_tc = sum_h w_th p_thc                          w = 1 / H unless given
(C1)   M_tc = sum_h p_thc f(v_c . g_th)                 f = relu or the identity
(K3)   heads="mean":   KL_t = sum_c P_tc (log P_tc - log M_tc)
       heads="each":   KL_t = sum_h w_th sum_c P_tc (log P_tc - log p_thc)
       with P the target renormalised over the own columns
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import row_blocks, scores, vjp
from groundkern.selection import keys_of_rows


def _log_probabilities(q, k, *, at, own, visible, lse, over, scale, softcap) -> Tensor:
    """log p [n, Hq, C] of (K1), finite everywhere and meaningful on own columns only."""
    if over == "columns":
        s = scores(q, k[:, at], scale, softcap)  # [n, Hq, C]
        kept = own | ~own.any(-1, keepdim=True)  # a row without own columns is masked by the caller
        return s - s.masked_fill(~kept[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    s = scores(q, k, scale, softcap)  # [n, Hq, S]
    kept = visible | ~visible.any(-1, keepdim=True)
    norm = s.masked_fill(~kept[:, None], -torch.inf).logsumexp(-1)  # [n, Hq]
    if lse is not None:  # the given normaliser's value with the softmax's gradient
        norm = norm - norm.detach() + torch.where(lse.isfinite(), lse, norm.detach())
    return s[..., at] - norm[..., None]


def _map_block(q, k, v, g, head_weight, *, at, own, rectify, **attention) -> Tensor:
    """(K2) or, with g, (C1): rows of one sequence -> [n, C]."""
    log_p = _log_probabilities(q, k, at=at, own=own, **attention)
    p = log_p.masked_fill(~own[:, None], -torch.inf).exp()  # [n, Hq, C]
    if g is None:
        return torch.einsum("nh,nhc->nc", head_weight, p)
    value = scores(g, v[:, at], 1.0, 0.0)  # v_c . g_th, [n, Hq, C]
    return (p * (value.relu() if rectify else value)).sum(1)


def _kl_block(q, k, head_weight, *, target, own, heads, **attention) -> Tensor:
    """(K3): rows of one sequence -> [n]."""
    mass = torch.where(own, target, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / torch.where(total > 0, total, 1.0)  # all zero where nothing is left
    log_p = _log_probabilities(q, k, own=own, **attention).masked_fill(~own[:, None], 0.0)
    log_target = torch.where(target > 0, target, 1.0).log()
    if heads == "each":
        per_head = (target[:, None] * (log_target[:, None] - log_p)).sum(-1)  # [n, Hq]
        return (head_weight * per_head).sum(1)
    weighted = torch.where(head_weight > 0, 0.0, -torch.inf)[..., None]  # [n, Hq, 1]
    shift = (log_p + weighted).amax(1).detach()  # [n, C]
    shift = torch.where(shift.isfinite(), shift, 0.0)
    relative = (
        (log_p - shift[:, None]).clamp(max=80.0).exp()
    )  # a head of weight 0 may lie far above
    mixture = torch.einsum("nh,nhc->nc", head_weight, relative)  # M_tc exp(-shift)
    log_map = shift + torch.where(target > 0, mixture, 1.0).log()
    return (target * (log_target - log_map)).sum(-1)


def _blocks(
    q: Tensor,
    k: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    over: str,
    scale: float,
    softcap: float,
) -> Iterator[tuple[int, slice, dict]]:
    """Yield (b, rows, keyword arguments of a block); what follows k here is `*attention` below."""
    if k.shape[2] == 0:
        return
    keys = k.shape[2] if over == "visible" else columns.shape[1]
    for b, rows in row_blocks(sequence, k.shape[0], q.shape[1] * max(keys, columns.shape[1])):
        visible = keys_of_rows(start[rows], stop[rows], None, None, rows, k.shape[2])
        usable = keys_of_rows(start[rows], stop[rows], words, set_index, rows, k.shape[2])
        at = columns[b].clamp(min=0).long()
        yield (
            b,
            rows,
            {
                "at": at,
                "own": (columns[b] >= 0) & usable[:, at],
                "visible": visible,
                "lse": None if lse is None else lse[rows],
                "over": over,
                "scale": scale,
                "softcap": softcap,
            },
        )


def map_forward(q, k, v, g, head_weight, rectify: bool, *attention) -> Tensor:
    """[N, C]; either head_weight [N, Hq] or v and g are given."""
    inputs = (q, k, v, g, head_weight)
    out = q.new_zeros(q.shape[0], attention[3].shape[1], dtype=accumulation_dtype(q.dtype))
    for b, rows, block in _blocks(q, k, *attention):
        part = _part(q, inputs, (rows, b, b, rows, rows))
        out[rows] = _map_block(*part, rectify=rectify, **block)
    return out


def map_backward(dmap: Tensor, q, k, v, g, head_weight, rectify: bool, *attention):
    """dq, dk, dv, dg, dhead_weight; None for the inputs that are absent."""
    inputs = (q, k, v, g, head_weight)
    blocks = (
        ((rows, b, b, rows, rows), partial(_map_block, rectify=rectify, **block), dmap[rows])
        for b, rows, block in _blocks(q, k, *attention)
    )
    return _sum_gradients(q, inputs, blocks)


def kl_forward(q, k, head_weight, target: Tensor, heads: str, *attention) -> Tensor:
    """[N]."""
    out = q.new_zeros(q.shape[0], dtype=accumulation_dtype(q.dtype))
    for b, rows, block in _blocks(q, k, *attention):
        *part, mass = _part(q, (q, k, head_weight, target), (rows, b, rows, rows))
        out[rows] = _kl_block(*part, target=mass, heads=heads, **block)
    return out


def kl_backward(dkl: Tensor, q, k, head_weight, target: Tensor, heads: str, *attention):
    """dq, dk, dhead_weight."""
    mass = target.to(accumulation_dtype(q.dtype))
    blocks = (
        ((rows, b, rows), partial(_kl_block, target=mass[rows], heads=heads, **block), dkl[rows])
        for b, rows, block in _blocks(q, k, *attention)
    )
    return _sum_gradients(q, (q, k, head_weight), blocks)


def _part(q: Tensor, inputs, places) -> list[Tensor | None]:
    """One block's part of each input, in the dtype sums are made in."""
    dtype = accumulation_dtype(q.dtype)
    return [None if x is None else x[i].to(dtype) for x, i in zip(inputs, places, strict=True)]


def _sum_gradients(q: Tensor, inputs, blocks) -> tuple[Tensor | None, ...]:
    """Sum the gradients of (places, function, upstream) blocks, shaped like the inputs."""
    dtype = accumulation_dtype(q.dtype)
    sums = [None if x is None else x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    for places, function, upstream in blocks:
        parts = vjp(function, _part(q, inputs, places), (upstream,))
        for total, place, part in zip(sums, places, parts, strict=True):
            if total is not None:
                total[place] += part
    return tuple(None if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True))
