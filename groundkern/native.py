"""What the launchers of the C++ kernels share: how a tensor reaches groundkern._C, and when it
cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# What groundkern._C takes for a tensor: address, dtype code, sizes, strides in elements.
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def dtype_codes() -> dict[torch.dtype, int]:
    from groundkern import _C

    names = ("float32", "bfloat16", "float16", "int32", "int64")
    return {getattr(torch, name): getattr(_C, name) for name in names}


def unsupported(*operands: Tensor | None) -> str | None:
    """Why no C++ kernel can serve these tensors, in one sentence; None when one may."""
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


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, on huge pages where it is large: 128 MiB of fresh 4 KiB pages take as long to
    touch as a tenth of a matrix product of 512 x 1024 x 32,768 in fp32."""
    from groundkern import _C

    x = torch.empty(sizes, dtype=dtype)
    _C.prefer_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    transposed_a: bool = False,
    transposed_b: bool = False,
    add: bool = False,
) -> None:
    """out [M, N] = a b, of a [M, K] and b [K, N] or the transpose of one of them; `add` to out.

    On an EPYC 9005, one thread, 512 x 1024 x 32,768 in fp32: 260 GFLOP/s in panels, 95 in torch's
    library, which leaves half of the vector unused. In bf16 the plain product (dlogits weight) is
    the faster one in panels, 425 to 375; the transposed ones in torch's library, 440 to 400.
    """
    from groundkern import _C

    own = a.dtype == torch.float32 or not (transposed_a or transposed_b or add)
    if own and _C.has_matrix_product(dtype_codes()[a.dtype]):
        tensors = {"a": rows_contiguous(a), "b": rows_contiguous(b), "out": out}
        options = {"transposed_a": transposed_a, "transposed_b": transposed_b, "add": add}
        call(_C.matrix_product, tensors, **options)
    elif add:
        out.addmm_(a.t() if transposed_a else a, b.t() if transposed_b else b)
    else:
        torch.mm(a.t() if transposed_a else a, b.t() if transposed_b else b, out=out)


def _view(x: Tensor) -> View:
    return x.data_ptr(), dtype_codes()[x.dtype], tuple(x.shape), x.stride()


def selection(
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


def call(function: Callable, tensors: dict[str, Tensor | None], **options: float | str) -> None:
    """Hand every tensor's memory to _C; `tensors` keeps it alive until _C returns."""
    views = {name: None if x is None else _view(x) for name, x in tensors.items()}
    function(**views, **options, threads=torch.get_num_threads())
