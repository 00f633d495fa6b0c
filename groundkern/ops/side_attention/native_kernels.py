"""C++ kernels of side attention (CPU): csrc/cpu/side_attention.cpp on raw pointers and strides."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# What groundkern._C takes for a tensor: address, dtype code, sizes, strides in elements.
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@cache
def _dtype_codes() -> dict[torch.dtype, int]:
    from groundkern import _C

    names = ("float32", "bfloat16", "float16", "int32")
    return {getattr(torch, name): getattr(_C, name) for name in names}


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the C++ kernels cannot serve this call, in one sentence; None when they can.

    Args:
        q: [N, Hq, D] queries.
        k: [B, Hkv, S, D] keys.
        v: [B, Hkv, S, Dv] values.
    """
    try:
        codes = _dtype_codes()
    except ImportError as error:
        return f"the C++ extension groundkern._C cannot be imported: {error}"
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return f"the native kernels run on CPU tensors and these are on {q.device}"
    if q.dtype not in codes or q.dtype == torch.int32:
        return f"the native kernels take float32, bfloat16 or float16 and not {q.dtype}"
    if q.shape[2] == 0 or v.shape[3] == 0:
        return "the native kernels need head dimensions of at least 1"
    return None


def _rows_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _view(x: Tensor) -> View:
    return x.data_ptr(), _dtype_codes()[x.dtype], tuple(x.shape), x.stride()


def _selection(
    sequence: Tensor, start: Tensor, stop: Tensor, words: Tensor | None, set_index: Tensor | None
) -> dict[str, Tensor | None]:
    """The arguments that say which keys each row sees, as _C names them, contiguous."""
    named = {
        "sequence": sequence,
        "start": start,
        "stop": stop,
        "words": words,
        "set_index": set_index,
    }
    return {name: None if x is None else x.contiguous() for name, x in named.items()}


def _call(function, tensors: dict[str, Tensor | None], scale: float, softcap: float) -> None:
    """Hand every tensor's memory to _C; `tensors` keeps it alive until _C returns."""
    views = {name: None if x is None else _view(x) for name, x in tensors.items()}
    function(**views, scale=scale, softcap=softcap, threads=torch.get_num_threads())


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
    inputs = {name: _rows_contiguous(x) for name, x in (("q", q), ("k", k), ("v", v))}
    selection = _selection(sequence, start, stop, words, set_index)
    outputs = {"out": out, "lse": own_lse}
    _call(_C.side_attention_forward, inputs | selection | outputs, scale, softcap)
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
    inputs = {name: _rows_contiguous(x) for name, x in named.items()}
    selection = _selection(sequence, start, stop, words, set_index)
    gradients = {f"d{name}": torch.empty(inputs[name].shape, dtype=q.dtype) for name in "qkv"}
    _call(_C.side_attention_backward, inputs | selection | gradients, scale, softcap)
    return gradients["dq"], gradients["dk"], gradients["dv"]
