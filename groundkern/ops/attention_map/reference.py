"""The specification of attention maps, contributions and their KL, in plain torch.

       own_tc: column c of the row's sequence is a key that the row may use
(K1)   p_thc = exp(s_thc - norm_th) on own columns, else 0
       norm_th: log-sum-exp over the own columns (over="columns") or all visible keys ("visible"),
       or the given lse; where that is infinite, head h is left out of row t
(K2)   M_tc = sum_h w_th p_thc                          w = 1 / H unless given
(C1)   M_tc = sum_h p_thc f(v_c . g_th)                 f = relu or the identity
(K3)   heads="mean":   KL_t = sum_c P_tc (log P_tc - log M_tc)
       heads="each":   KL_t = sum_h w_th sum_c P_tc (log P_tc - log p_thc)
       with P the target renormalised over the own columns
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from groundkern.calls import Call
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    MAP,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Saved,
    Upstream,
    like_gradients,
    output_shape,
)
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import row_blocks, scores, vjp


def _log_probabilities(q, k, lse, *, at, own, visible, options: Options) -> Tensor:
    """log p [n, Hq, C] of (K1), meaningful on own columns only, finite unless an input is not."""
    scale, softcap = options.scale, options.softcap
    lse = None if lse is None else torch.where(lse.isinf(), 0.0, lse)
    if options.lse_grad:
        return scores(q, k[:, at], scale, softcap) - lse[..., None]
    if options.over == "columns":
        s = scores(q, k[:, at], scale, softcap)  # [n, Hq, C]
        counted = own | ~own.any(-1, keepdim=True)  # the caller masks rows without own columns
        return s - s.masked_fill(~counted[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    s = scores(q, k, scale, softcap)  # [n, Hq, S]
    counted = visible | ~visible.any(-1, keepdim=True)
    norm = s.masked_fill(~counted[:, None], -torch.inf).logsumexp(-1)  # [n, Hq]
    if lse is not None:  # the given normaliser's value with the softmax's gradient
        norm = norm - norm.detach() + lse.detach()
    return s[..., at] - norm[..., None]


def _counted(q: Tensor, lse: Tensor | None) -> Tensor:
    """bool [n, Hq]: the heads that are not left out."""
    return q.new_ones(q.shape[:2], dtype=torch.bool) if lse is None else ~lse.isinf()


def _map_block(
    q, k, v, g, head_weight, lse, *, target, own, options: Options, **attention
) -> Tensor:
    """(K2) or (C1): rows of one sequence -> [n, C]."""
    log_p = _log_probabilities(q, k, lse, own=own, options=options, **attention)
    used = own[:, None] & _counted(q, lse)[..., None]
    p = log_p.masked_fill(~used, -torch.inf).exp()  # [n, Hq, C]
    if options.kind == MAP:
        return torch.einsum("nh,nhc->nc", head_weight, p)
    value = scores(g, v[:, attention["at"]], 1.0, 0.0)  # v_c . g_th, [n, Hq, C]
    return (p * (value.relu() if options.rectify else value)).sum(1)


def _kl_block(
    q, k, v, g, head_weight, lse, *, target, own, options: Options, **attention
) -> Tensor:
    """(K3): rows of one sequence -> [n]."""
    counted = _counted(q, lse)  # [n, Hq]
    mass = torch.where(own & counted.any(-1, keepdim=True), target, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / torch.where(total > 0, total, 1.0)  # all zero if nothing is left
    log_p = _log_probabilities(q, k, lse, own=own, options=options, **attention)
    log_p = log_p.masked_fill(~own[:, None], 0.0)
    log_target = torch.where(target > 0, target, 1.0).log()
    if options.kind == KL_EACH:
        per_head = (target[:, None] * (log_target[:, None] - log_p)).sum(-1)  # [n, Hq]
        return (head_weight * per_head.masked_fill(~counted, 0.0)).sum(1)
    weighted = torch.where(counted & (head_weight > 0), 0.0, -torch.inf)[..., None]  # [n, Hq, 1]
    shift = (log_p + weighted).amax(1).detach()  # [n, C]
    shift = torch.where(shift.isfinite(), shift, 0.0)
    relative = log_p - shift[:, None]
    # A head of weight 0 may lie far above. (clamp would give NaN no gradient.)
    relative = torch.where(relative > 80.0, 80.0, relative).exp()
    relative = relative.masked_fill(~counted[..., None], 0.0)
    mixture = torch.einsum("nh,nhc->nc", head_weight, relative)  # M_tc exp(-shift)
    log_map = shift + torch.where(target > 0, mixture, 1.0).log()
    return (target * (log_target - log_map)).sum(-1)


def forward(inputs: Inputs, call: Call) -> Outputs:
    """[N, C], of a KL [N]."""
    shape = output_shape(inputs, call.selection.columns, call.options)
    out = inputs.q.new_zeros(shape, dtype=accumulation_dtype(inputs.q.dtype))
    for b, rows, block in _blocks(inputs, call):
        out[rows] = block(*_parts(inputs, b, rows))
    return Outputs(out, out.new_empty(0), out.new_empty(0))


def backward(above: Upstream, inputs: Inputs, saved: Saved, call: Call) -> Gradients:
    """By autograd on the blocks."""
    like = like_gradients(inputs, call.options)
    wide = accumulation_dtype(inputs.q.dtype)
    sums = [None if x is None else x.new_zeros(x.shape, dtype=wide) for x in like]
    for b, rows, block in _blocks(inputs, call):
        gradients = vjp(block, _parts(inputs, b, rows), (above.upstream[rows],))
        for total, place, part in zip(sums, _places(b, rows), gradients, strict=True):
            if total is not None:
                total[place] += part
    return Gradients(*(None if s is None else s.to(x.dtype) for s, x in zip(sums, like)))


def _blocks(inputs: Inputs, call: Call) -> Iterator[tuple[int, slice, Callable]]:
    """Yield (b, rows, function of `_parts(inputs, b, rows)`)."""
    q, k, selection, options = inputs.q, inputs.k, call.selection, call.options
    columns = selection.columns
    if k.shape[2] == 0:
        return
    function = _map_block if options.kind in (MAP, CONTRIBUTION) else _kl_block
    keys = max(columns.shape[1], k.shape[2] if options.over == "visible" else 0)
    for b, rows in row_blocks(selection.sequence, k.shape[0], q.shape[1] * keys):
        at = columns[b].clamp(min=0).long()
        target = inputs.target
        yield (
            b,
            rows,
            partial(
                function,
                at=at,
                own=(columns[b] >= 0) & selection.allowed(rows, k.shape[2])[:, at],
                visible=selection.visible(rows, k.shape[2]),
                target=None if target is None else target[rows].to(accumulation_dtype(q.dtype)),
                options=options,
            ),
        )


def _places(b: int, rows: slice) -> tuple[slice | int, ...]:
    """Where q, k, v, g, head_weight and lse of a block are."""
    return rows, b, b, rows, rows, rows


def _parts(inputs: Inputs, b: int, rows: slice) -> list[Tensor | None]:
    """A block's part of q, k, v, g, head_weight and lse, in the dtype of its sums."""
    wide, given = accumulation_dtype(inputs.q.dtype), (*inputs[:5], inputs.lse)
    return [None if x is None else x[i].to(wide) for x, i in zip(given, _places(b, rows))]
