"""C++ kernels of side attention (CPU): csrc/cpu/side_attention.cpp on raw pointers and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import native


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the C++ kernels cannot serve this call, in one sentence; None when they can.

    Args:
        q: [N, Hq, D] queries.
        k: [B, Hkv, S, D] keys.
        v: [B, Hkv, S, Dv] values.
    """
    reason = native.unsupported(q, k, v)
    if reason is not None:
        return reason
    if q.shape[2] == 0 or v.shape[3] == 0:
        return "the native kernels need head dimensions of at least 1"
    return None


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
    """out [N, Hq, Dv] in q's dtype and its log-sum-exp [N, Hq] fp32.

    The given `lse` is only a shift and never changes the result: the running maximum needs none.
    """
    from groundkern import _C

    rows, heads = q.shape[:2]
    out = torch.empty(rows, heads, v.shape[3], dtype=q.dtype)
    own_lse = torch.empty(rows, heads, dtype=torch.float32)
    inputs = {name: native.rows_contiguous(x) for name, x in (("q", q), ("k", k), ("v", v))}
    selection = native.selection(sequence, start, stop, words, set_index)
    outputs = {"out": out, "lse": own_lse}
    native.call(
        _C.side_attention_forward, inputs | selection | outputs, scale=scale, softcap=softcap
    )
    return out, own_lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    out_lse: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run.

    `out` is for backends that take delta from it: here it is summed from p, free of out's rounding.
    """
    from groundkern import _C

    named = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "lse": out_lse}
    inputs = {name: native.rows_contiguous(x) for name, x in named.items()}
    selection = native.selection(sequence, start, stop, words, set_index)
    gradients = {f"d{name}": torch.empty(inputs[name].shape, dtype=q.dtype) for name in "qkv"}
    native.call(
        _C.side_attention_backward, inputs | selection | gradients, scale=scale, softcap=softcap
    )
    return gradients["dq"], gradients["dk"], gradients["dv"]
