"""Heat-maps as arrays on disk: their shape by the header alone, then their numbers; never pickle.

A `.npy` holds [height, width]. A `.npz` or `.safetensors` holds `heat`, [height, width] or of a
video [T, height, width], and with it `times`: T seconds that ascend, at which each map begins.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from groundkern.trainer.wording import short

SUFFIXES = (".npy", ".npz", ".safetensors")
_PLAIN = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"}
T = TypeVar("T")
_DIMS = {2: "[height, width]", 3: "[T, height, width]"}

Fail = Callable[[str, object], Exception]
"""Makes an error of what was wanted and what came."""


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    plain: bool  # numbers, of at most 8 bytes each


class Header(NamedTuple):
    """What a file holds.

    Args:
        shape: [height, width] or [T, height, width].
        times: T seconds, of the latter.
    """

    shape: tuple[int, ...]
    times: tuple[float, ...] | None


def read_header(path: Path, fail: Fail, *, most: int, timed: bool) -> Header:
    """The shape of a heat, and its times; none of its numbers is read yet.

    Args:
        path: of a file with one of `SUFFIXES`.
        fail: makes the errors.
        most: numbers that it may have.
        timed: whether it may have maps of several times.

    Raises:
        What `fail` makes: another kind of file, of array or of numbers, too many of them, or times
        that are not there or do not ascend.
    """
    found = _guarded(path, fail, lambda: _declared(path, "heat"))
    shape = found.shape
    dims = (2, 3) if timed and path.suffix != ".npy" else (2,)
    if not found.plain or len(shape) not in dims:
        wanted = f"numbers {' or '.join(_DIMS[n] for n in dims)}, of at most 8 bytes each"
        raise fail(wanted, f"{found.dtype} {list(shape)} in {path.name!r}")
    size = int(np.prod(shape, dtype=object))
    if not 0 < size <= most:
        raise fail(f"1 to {most} numbers", f"{' x '.join(map(str, shape[::-1]))} in {path.name!r}")
    if len(shape) == 2:
        return Header(shape, None)
    wanted = f"`times` beside the heat: {shape[0]} seconds that ascend, from 0"
    said = _guarded(path, fail, lambda: _declared(path, "times"))
    if said.shape != shape[:1] or not said.plain:
        raise fail(wanted, f"{said.dtype} {list(said.shape)} in {path.name!r}")
    times = _guarded(path, fail, lambda: _read(path, "times")).astype(np.float64)
    if not (np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) > 0).all()):
        raise fail(wanted, f"{short(times[:20].tolist())} in {path.name!r}")
    return Header(shape, tuple(times.tolist()))


def read_heat(path: Path, fail: Fail, shape: tuple[int, ...]) -> NDArray:
    """The numbers of a heat, divided by their maximum.

    Args:
        path: of a file whose header was read.
        fail: makes the errors.
        shape: of the header; another by now is an error.

    Returns:
        fp32 of this shape.

    Raises:
        What `fail` makes: numbers that are negative or not finite, or zeros alone.
    """
    found = _guarded(path, fail, lambda: _declared(path, "heat"))
    if found.shape != shape or not found.plain:
        wanted = f"the heat of {list(shape)} that was there"
        raise fail(wanted, f"{found.dtype} {list(found.shape)} in {path.name!r}")
    values = _guarded(path, fail, lambda: _read(path, "heat"))
    return scaled(values, fail, path.name)


def scaled(values: NDArray, fail: Fail, name: str) -> NDArray:
    """Numbers divided by their maximum, fp32.

    Args:
        values: of a heat.
        fail: makes the errors.
        name: of its file.

    Raises:
        What `fail` makes: numbers that are negative or not finite, or zeros alone.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high < float("inf")):  # not a number is neither
        raise fail("a heat of finite numbers >= 0", f"{low} to {high} in {name!r}")
    if high == 0:
        raise fail("a heat with a number above 0", "zeros")
    made = np.empty(values.shape, np.float32)  # divided first, since float64 may not fit
    return np.divide(values, high, out=made, casting="same_kind")


def _guarded(path: Path, fail: Fail, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # a header is Python's own notation, or JSON, and may be anything
        got = f"{path.name!r} ({short(str(error))})"
        raise fail(f"a {path.suffix} of plain numbers", got) from None


def _declared(path: Path, name: str) -> _Array:
    """What a file's header says of an array."""
    if path.suffix == ".npy":
        found = np.lib.format.open_memmap(path, mode="r")
        return _Array(found.shape, str(found.dtype), _plain(found.dtype))
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            shape, dtype = _npy_header(file)
        return _Array(shape, str(dtype), _plain(dtype))
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        found = file.get_slice(name)
        dtype = found.get_dtype()
        return _Array(tuple(found.get_shape()), dtype, dtype in _PLAIN)


def _read(path: Path, name: str) -> NDArray:
    if path.suffix == ".npy":
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    import torch  # NumPy has no bfloat16
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = file.get_tensor(name)
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def _plain(dtype: np.dtype) -> bool:
    return dtype.kind in "buif" and dtype.itemsize <= 8
