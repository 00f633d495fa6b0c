"""Large CPU buffers whose memory is kept for the next call.

Fresh memory is dear: where this was written, 64 MiB took 18 ms to touch in pages of 4 KiB and 4 ms
in huge ones, next to 35 ms for the matrix product that fills them; and up to 230 ms where the host
of the virtual machine had taken idle pages back. torch's CPU allocator returns whatever is over
32 MiB to the system at once.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST = 32 * 2**20  # bytes; smaller ones malloc keeps itself
KEPT_AT_MOST = 256 * 2**20  # bytes that wait for their next use; set it to 0 to keep none

_waiting: list[mmap.mmap] = []  # list.remove and .append are atomic: no lock, finalizers use it too


def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, in memory that had another tensor before where it is large.

    The tensor's storage cannot be resized. With its last view the memory is free for the next.
    """
    count = torch.Size(sizes).numel()
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(sizes, dtype=dtype)
    try:
        block = _take(size)
    except OSError:  # no such memory: torch says so in its own words
        return torch.empty(sizes, dtype=dtype)
    lease = (ctypes.c_ubyte * size).from_buffer(block)  # the storage holds it
    weakref.finalize(lease, _put_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(sizes)


def release() -> None:
    """Give all waiting memory back to the system."""
    _waiting.clear()


def _take(size: int) -> mmap.mmap:
    """The smallest waiting block that fits and is not twice too large, else a new one."""
    for block in sorted(_waiting, key=len):
        if size <= len(block) <= 2 * size:
            try:
                _waiting.remove(block)
                return block
            except ValueError:  # another thread has taken it
                continue
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # huge pages, where the system has them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _put_back(block: mmap.mmap) -> None:
    if len(block) > KEPT_AT_MOST:
        return
    _waiting.append(block)
    while sum(map(len, _waiting)) > KEPT_AT_MOST:
        _waiting.pop(0)  # the one that has waited longest
