"""What arguments have to be; errors have the one form of `groundkern.messages`.

Metadata (shapes, dtypes, devices) is always checked. Values are checked where looking at them is
free of a device sync: on CPU, or anywhere under GROUNDKERN_VALIDATE=1.
"""

import os

import torch
from torch import Tensor

from groundkern.messages import fail as fail
from groundkern.messages import require as require

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(
    name: str,
    x: object,
    dims: str,
    sizes: dict[str, int],
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that `x` is a tensor of shape `dims`, e.g. `"B Hkv S D"`.

    `sizes` maps dimension names to the sizes known so far; names met for the first time are bound
    to what `x` has, so that the next tensor is held to them.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    names = dims.split()
    if not isinstance(x, Tensor):
        fail(name, f"a tensor [{', '.join(names)}]", type(x).__name__, TypeError)
    shape = x.shape
    good = len(shape) == len(names)
    if good:  # plain loops: this runs for every argument of every op in every layer
        known = dict(sizes)
        for n, s in zip(names, shape, strict=True):
            if known.setdefault(n, s) != s:
                good = False
                break
    if not good:
        wanted = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in names)
        fail(name, f"shape [{wanted}]", list(shape))
    sizes.update(known)
    if dtype is not None:
        wanted_dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in wanted_dtypes:
            fail(name, " or ".join(str(d) for d in wanted_dtypes), x.dtype, TypeError)
    if device is not None and x.device != device:
        fail(name, f"a tensor on {device}", f"one on {x.device}")


def values_visible(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on CPU, or anywhere under GROUNDKERN_VALIDATE=1."""
    if torch.compiler.is_compiling():
        return False
    everywhere = os.environ.get("GROUNDKERN_VALIDATE") == "1"
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and (x.device.type == "cpu" or (everywhere and x.device.type != "meta"))
        for x in tensors
    )


def finite_positive(name: str, x: float | None) -> None:
    """Check an optional positive number such as `scale` or `softcap`."""
    if x is not None and not 0.0 < x < float("inf"):
        fail(name, "a positive finite number or None", x)
