"""C++ kernels of side attention (CPU): csrc/cpu/side_attention.cpp on raw pointers and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import _C

_CODES = {
    torch.float32: _C.float32,
    torch.bfloat16: _C.bfloat16,
    torch.float16: _C.float16,
    torch.int32: _C.int32,
}

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
