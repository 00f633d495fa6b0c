"""Which implementation serves a call, and why another cannot."""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch

from groundkern import checks

NAMES = ("reference", "triton", "native")
_PREFERRED = {"cuda": "triton", "cpu": "native"}
# Looked up once, so that torch.compile sees a constant.
_NO_TRITON = (
    None
    if importlib.util.find_spec("triton")
    else "the triton package is not installed (pip install triton)"
)


def available_backends() -> dict[str, str | None]:
    """Which backends run on this machine.

    Returns:
        Every backend's name, with None if it runs here, else why not in one sentence.
    """
    return {"reference": None, "triton": _missing_triton(), "native": _missing_native()}


def _missing_triton() -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if _NO_TRITON or torch.cuda.is_available() or interpreted:
        return _NO_TRITON
    return "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on CPU, slowly)"


@cache
def _missing_native() -> str | None:
    try:
        from groundkern import _C  # noqa: F401
    except ImportError as error:
        return f"the C++ extension groundkern._C cannot be imported: {error}"
    return None


def choose(backend: str, device: torch.device, unsupported: Callable[[str], str | None]) -> str:
    """The backend that serves a call.

    `auto` prefers triton on CUDA and ROCm, native on CPU, and falls back to the reference (with one
    warning on a GPU). A named backend never falls back.

    Args:
        backend: "auto" or a name.
        device: where the call's tensors are.
        unsupported: the op's own reasons: a backend's name -> one sentence, or None if it serves
            this call.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve the call.
    """
    if backend not in ("auto", *NAMES):
        wanted = " | ".join(repr(n) for n in ("auto", *NAMES))
        checks.fail("backend", wanted, repr(backend))
    if backend == "reference":
        return backend
    name = _PREFERRED.get(device.type, "reference") if backend == "auto" else backend
    if name == "reference":
        return name
    reason = (_NO_TRITON if name == "triton" else None) or unsupported(name)
    if reason is None:
        return name
    if backend != "auto":
        checks.fail("backend", "one that serves this call", f"{name!r}: {reason}")
    if device.type == "cuda":
        _warn_once(f"groundkern runs its slow reference on {device.type}: {reason}")
    return "reference"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
