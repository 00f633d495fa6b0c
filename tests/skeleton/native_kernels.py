"""There are no C++ kernels of this op, which `unsupported` says."""

from groundkern import native
from tests.skeleton import Inputs


def unsupported(inputs: Inputs) -> str | None:
    """Why native cannot serve this call, in one sentence; None if it can."""
    return native.unsupported(*inputs) or "the skeleton has no C++ kernels"
