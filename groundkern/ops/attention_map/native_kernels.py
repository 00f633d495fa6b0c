"""C++ kernels of attention maps, contributions and their KL (CPU)."""

from torch import Tensor


def unsupported(q: Tensor, k: Tensor, v: Tensor | None) -> str | None:
    """Why native cannot serve this call, in one sentence; None when it can."""
    return "attention_map has no native kernel in this version"
