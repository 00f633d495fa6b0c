"""What the launchers of the C++ kernels share: how tensors are handed to groundkern._C, and why a
call cannot be served."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.selection import Selection

# A tensor as groundkern._C reads it: address, dtype code, sizes, strides in elements.
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def dtype_codes() -> dict[torch.dtype, int]:
    from groundkern import _C

    names = ("float32", "bfloat16", "float16", "int32", "int64")
    return {getattr(torch, name): getattr(_C, name) for name in names}


def unsupported(*operands: Tensor | None) -> str | None:
    """Why no C++ kernel can serve these tensors, in one sentence; None if one can."""
    try:
        dtype_codes()
    except ImportError as error:
        return f"the C++ extension groundkern._C cannot be imported: {error}"
    for x in operands:
        if x is not None and x.device.type != "cpu":
            return f"the native kernels run on CPU tensors and these are on {x.device}"
        if x is not None and x.dtype not in FLOATS:
            return f"the native kernels take float32, bfloat16 or float16 and not {x.dtype}"
    return None


def unsupported_output_head(group: object, *tensors: Tensor | None) -> str | None:
    """The same for an op on an output head, whose vocabulary a process group may shard."""
    if group is not None:
        return "the native kernels do not shard the vocabulary over a process group"
    return unsupported(*tensors)


def unsupported_heads(*operands: Tensor | None) -> str | None:
    """`unsupported`, for operands whose last dimension is a head dimension."""
    reason = unsupported(*operands)
    if reason is None and any(x is not None and x.shape[-1] == 0 for x in operands):
        return "the native kernels need head dimensions of at least 1"
    return reason


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether our own matrix products are faster than torch's on this CPU.

    On an EPYC 9005, one thread, 512 x 1024 x 32,768: in fp32 260 GFLOP/s against 95 of torch's
    library, which uses half of the vector; in bf16 490 against 375 to 440. torch's library uses
    the tile registers (AMX) if the CPU has them, and our products do not.
    """
    from groundkern import _C

    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return not tiles and _C.has_matrix_product(dtype_codes()[dtype])


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch multiplies operands of a dtype in: bf16 where this CPU multiplies it, else fp32.
    torch multiplies fp16 40 times slower."""
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _view(x: Tensor) -> View:
    return x.data_ptr(), dtype_codes()[x.dtype], tuple(x.shape), x.stride()


def operands(inputs: NamedTuple) -> dict[str, Tensor]:
    """The inputs of an op that are there, by name, their last dimensions contiguous."""
    present = {name: x for name, x in inputs._asdict().items() if x is not None}
    return {name: rows_contiguous(x) for name, x in present.items()}


def selection(of: Selection) -> dict[str, Tensor | None]:
    """The arguments that say which keys each row sees, as _C names them."""
    named = of.contiguous()._asdict()
    if of.columns is None:
        del named["columns"]
    return named


def call(
    function: Callable[..., object], tensors: dict[str, Tensor | None], **options: float | str
) -> None:
    """Call a function of _C; `tensors` keeps their memory alive until it returns."""
    views = {name: None if x is None else _view(x) for name, x in tensors.items()}
    function(**views, **options, threads=torch.get_num_threads())
