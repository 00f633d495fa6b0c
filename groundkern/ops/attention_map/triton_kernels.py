"""Triton kernels of attention maps, contributions and their KL (CUDA, ROCm)."""

from torch import Tensor


def unsupported(q: Tensor, k: Tensor, v: Tensor | None) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None when it can."""
    return "attention_map has no Triton kernel in this version"
