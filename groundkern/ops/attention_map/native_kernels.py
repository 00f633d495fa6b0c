"""C++ kernels of attention maps, contributions and their KL (CPU): csrc/cpu/attention_map.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import native

ATTENTION, CONTRIBUTION, KL_MEAN, KL_EACH = range(4)  # MapKind of csrc/ops.h


def unsupported(q: Tensor, k: Tensor, v: Tensor | None) -> str | None:
    """Why native cannot serve this call, in one sentence; None when it can.

    Args:
        q: [N, Hq, D] queries.
        k: [B, Hkv, S, D] keys.
        v: [B, Hkv, S, Dv] values, of a contribution.
    """
    reason = native.unsupported(q, k, v)
    if reason is None and (q.shape[2] == 0 or (v is not None and v.shape[3] == 0)):
        return "the native kernels need head dimensions of at least 1"
    return reason


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    head_weight: Tensor | None,
    target: Tensor | None,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
) -> dict[str, Tensor | None]:
    """The tensors as _C names them."""
    named = {"q": q, "k": k, "v": v, "g": g, "head_weight": head_weight, "lse": lse}
    named["target"] = None if target is None else target.float()
    rows = {name: None if x is None else native.rows_contiguous(x) for name, x in named.items()}
    selection = native.selection(sequence, start, stop, words, set_index)
    return rows | selection | {"columns": columns.contiguous()}


def _forward(kind: int, inputs, rectify: bool, selection, out: Tensor) -> Tensor:
    from groundkern import _C

    *tensors, over, scale, softcap = selection
    options = {"kind": kind, "over_columns": over == "columns", "rectify": rectify}
    arguments = _arguments(*inputs, *tensors) | {"out": out}
    native.call(_C.attention_map_forward, arguments, **options, scale=scale, softcap=softcap)
    return out


def _backward(
    kind: int, upstream: Tensor, inputs, rectify: bool, selection
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dg, dhead_weight; None for the inputs that are absent."""
    from groundkern import _C

    *tensors, over, scale, softcap = selection
    options = {"kind": kind, "over_columns": over == "columns", "rectify": rectify}
    names = ("q", "k", "v", "g", "head_weight")
    gradients = {
        f"d{name}": None if x is None else torch.empty(x.shape, dtype=x.dtype)
        for name, x in zip(names, inputs)
    }
    arguments = _arguments(*inputs, *tensors) | {"upstream": upstream.contiguous()} | gradients
    native.call(_C.attention_map_backward, arguments, **options, scale=scale, softcap=softcap)
    return tuple(gradients.values())


def map_forward(q, k, v, g, head_weight, rectify: bool, *selection) -> Tensor:
    """[N, C] fp32; either head_weight [N, Hq] or v and g are given."""
    kind = ATTENTION if g is None else CONTRIBUTION
    out = torch.empty(q.shape[0], selection[3].shape[1])
    return _forward(kind, (q, k, v, g, head_weight, None), rectify, selection, out)


def map_backward(dmap: Tensor, q, k, v, g, head_weight, rectify: bool, *selection):
    """dq, dk, dv, dg, dhead_weight; None for the inputs that are absent."""
    kind = ATTENTION if g is None else CONTRIBUTION
    return _backward(kind, dmap, (q, k, v, g, head_weight, None), rectify, selection)


def kl_forward(q, k, head_weight, target: Tensor, heads: str, *selection) -> Tensor:
    """[N] fp32."""
    kind = KL_MEAN if heads == "mean" else KL_EACH
    inputs = (q, k, None, None, head_weight, target)
    return _forward(kind, inputs, False, selection, torch.empty(q.shape[0]))


def kl_backward(dkl: Tensor, q, k, head_weight, target: Tensor, heads: str, *selection):
    """dq, dk, dhead_weight."""
    kind = KL_MEAN if heads == "mean" else KL_EACH
    inputs = (q, k, None, None, head_weight, target)
    dq, dk, _, _, dhead_weight = _backward(kind, dkl, inputs, False, selection)
    return dq, dk, dhead_weight
