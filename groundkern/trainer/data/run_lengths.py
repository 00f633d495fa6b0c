"""COCO's run lengths: how many pixels outside, inside, outside, ..., column by column.

`{"size": [height, width], "counts": ...}`, counts as a list of numbers or as the string that
pycocotools writes: 5 bits a character, low ones first, from the fourth number on as the difference
from the last but one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundkern.trainer.data.images import wrong
from groundkern.trainer.wording import short

_FIRST, _LONGEST = 48, 7  # the character of 0; characters of a number below 2**32, with its sign


def size_of_runs(value: Any, *, where: str, field: str) -> tuple[int, int]:
    """Height and width of a record's run lengths.

    Raises:
        SampleError: not an object of `size` and `counts`, or a size that is no two numbers.
    """
    if not isinstance(value, dict) or set(value) != {"size", "counts"}:
        got = sorted(map(str, value)) if isinstance(value, dict) else short(value)
        wanted = 'a path, or run lengths {"size": [height, width], "counts": ...}'
        raise wrong(where, field, wanted, got)
    size = value["size"]
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_positive, size))):
        raise wrong(where, f"{field}.size", "[height, width] in pixels", short(size))
    return size[0], size[1]


def read_counts(counts: Any, pixels: int, *, where: str, field: str) -> NDArray[np.int64]:
    """The lengths of the runs.

    Args:
        counts: a list of numbers, or a string of COCO's.
        pixels: how many there are; the runs must be as long together.
        where, field: what starts the error message.

    Raises:
        SampleError: neither, a number that is no length, or another sum.
    """
    if isinstance(counts, str):
        runs = _unpacked(counts, where, field)
    elif isinstance(counts, list):
        bad = next((n for n in counts if type(n) is not int or not 0 <= n <= pixels), None)
        if bad is not None:
            raise wrong(where, field, f"lengths from 0 to {pixels}", short(bad))
        runs = np.array(counts, np.int64)
    else:
        raise wrong(where, field, "a list of lengths or a string", short(counts))
    if runs.size and not 0 <= int(runs.min()) <= int(runs.max()) <= pixels:
        got = int(runs.min()) if runs.min() < 0 else int(runs.max())
        raise wrong(where, field, f"lengths from 0 to {pixels}", got)
    if int(runs.sum()) != pixels:
        raise wrong(where, field, f"lengths of {pixels} pixels together", int(runs.sum()))
    return runs


def decoded(runs: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """The mask [height, width] of runs that are as long as it has pixels."""
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(inside.reshape(width, height).T)


def encoded(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The run lengths of a mask [height, width], counts as a string, as `mask` of a region."""
    height, width = mask.shape
    flat = np.concatenate([[False], np.asarray(mask, bool).T.reshape(-1), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
    if edges.size and edges[-1] == height * width:
        runs.pop()
    return {"size": [height, width], "counts": _packed(runs)}


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _packed(runs: list[int]) -> str:
    text = bytearray()
    for at, length in enumerate(runs):
        value = length - runs[at - 2] if at > 2 else length
        more = True
        while more:
            low, value = value & 31, value >> 5
            more = value != (-1 if low & 16 else 0)
            text.append(_FIRST + low + 32 * more)
    return text.decode("ascii")


def _unpacked(text: str, where: str, field: str) -> NDArray[np.int64]:
    """The numbers of a string, which may still be no lengths."""
    if not text.isascii() or not text:
        raise wrong(where, field, "a string of COCO's run lengths", short(text))
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - _FIRST
    last = (digits & 32) == 0
    if digits.min() < 0 or digits.max() > 63 or not last[-1]:
        raise wrong(where, field, "a string of COCO's run lengths", short(text))
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if int((ends - starts).max()) >= _LONGEST:
        raise wrong(where, field, f"numbers of at most {_LONGEST} characters", short(text))
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = (digits[ends] & 16) != 0
    values -= negative.astype(np.int64) << (5 * (ends - starts + 1))
    for first in (1, 2):  # differences from the last but one, from the fourth number on
        values[first::2] = np.cumsum(values[first::2])
    return values
