"""A pool of large CPU buffers, whose memory is reused by later calls.

The first touch of a fresh page is slow: on the machine this was written on, 64 MiB took 18 ms in
pages of 4 KiB and 4 ms in huge ones, next to 35 ms for the matrix product that fills them, and up
to 230 ms when the host of the virtual machine had reclaimed idle pages. torch's CPU allocator
returns everything over 32 MiB to the system at once.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST = 32 * 2**20  # bytes; malloc itself reuses smaller ones
POOLED_AT_MOST = 256 * 2**20  # bytes in the pool; 0: every buffer is freed after its last use

# No lock, because finalizers change it too: list.remove and .append are atomic.
_pool: list[mmap.mmap] = []


def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty`; a large tensor may reuse the memory of an earlier one.

    The tensor's storage cannot be resized. Its memory returns to the pool with its last view.
    """
    count = torch.Size(sizes).numel()
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(sizes, dtype=dtype)
    try:
        block = _take(size)
    except OSError:  # not enough memory: torch raises its own error
        return torch.empty(sizes, dtype=dtype)
    lease = (ctypes.c_ubyte * size).from_buffer(block)  # the storage keeps a reference to it
    weakref.finalize(lease, _put_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(sizes)


def release() -> None:
    """Return all pooled memory to the system."""
    _pool.clear()


def _take(size: int) -> mmap.mmap:
    """The smallest pooled block of size to 2 size bytes, else a new one."""
    for block in sorted(_pool, key=len):
        if size <= len(block) <= 2 * size:
            try:
                _pool.remove(block)
                return block
            except ValueError:  # another thread took it
                continue
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # huge pages, if the system has them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _put_back(block: mmap.mmap) -> None:
    if len(block) > POOLED_AT_MOST:
        return
    _pool.append(block)
    while sum(map(len, _pool)) > POOLED_AT_MOST:
        _pool.pop(0)  # the one unused for longest
