"""Triton kernels of side attention (CUDA, ROCm)."""

from torch import Tensor


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None when it can."""
    return "side_attention has no Triton kernel in this version"
