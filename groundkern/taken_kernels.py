"""The Triton kernel that joins the gradients of the main pass with those of rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton.language as tl
from torch import Tensor

from groundkern.calls import signature
from groundkern.tile_kernels import Keys, wide
from groundkern.tiles import Launcher, aligned, helper, kernel, rows_contiguous

BLOCK = 1024  # elements of a token that a program reads at a time


@helper
def _of_main(x, b, s, e, mask, DIM: tl.constexpr):
    """Elements e of the heads of one token of `Keys`, head by head, in fp32."""
    at = x.ptr + wide(b) * x.b + wide(s) * x.s + (e // DIM).to(tl.int64) * x.h + e % DIM
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@helper
def _join(to_ptr, main, beside, rows, token, sizes, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """All heads of one token: what the main pass has for it, what ops beside it have, and its
    rows, in order."""
    length, total, elements = sizes
    b, s = token // total, token % total
    for e0 in range(0, elements, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        mask = e < elements
        x = tl.zeros((BLOCK,), tl.float32)
        if main is not None:
            x += _of_main(main, b, s, e, mask & (s < length), DIM)
        if beside is not None:
            x += _of_main(beside, b, s, e, mask & (s < length), DIM)
        if rows is not None:
            for n in tl.static_range(len(rows)):
                ptr, first, order = rows[n]
                for i in range(tl.load(first + token), tl.load(first + token + 1)):
                    at = wide(tl.load(order + i)) * elements + e
                    x += tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_ptr + wide(token) * elements + e, x.to(to_ptr.dtype.element_ty), mask=mask)


@kernel
def _join_kernel(
    to,  # (q, k, v): [B, T, H, D], or None
    main,  # (q, k, v): `Keys` or None
    beside,  # (k, v): `Keys` or None
    rows,  # of each selection ([N, Hq, D], int32 [B * T + 1], int32 [N]) as `Places.by_token`
    length,  # S
    total,  # T
    q_elements,  # of a token
    k_elements,
    v_elements,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Program (token of all sequences, 0): its queries; (token, 1): its keys and values."""
    token = tl.program_id(0)
    if tl.program_id(1) == 0:
        if to[0] is not None:
            _join(to[0], main[0], None, rows, token, (length, total, q_elements), BLOCK, D)
    else:
        if to[1] is not None:
            _join(to[1], main[1], beside[0], None, token, (length, total, k_elements), BLOCK, D)
        if to[2] is not None:
            _join(to[2], main[2], beside[1], None, token, (length, total, v_elements), BLOCK, DV)


class Places(Protocol):
    """`groundkern.taken.Places`."""

    total: int
    launches: dict[Any, Any]

    def by_token(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Of each selection, the first row of each token, and the rows by their tokens."""


def _laid(batch: int, total: int, heads: int, dim: int) -> tuple[tuple[int, ...], ...]:
    """Shape and strides of [B, H, T, D] that lies in memory as projections lay it: [B, T, H, D]."""
    return (batch, heads, total, dim), (total * heads * dim, dim, heads * dim, 1)


class _Launch:
    """What is launched for gradients of a signature; arguments as in `join`."""

    def __init__(
        self,
        places: Places,
        main: Sequence[Tensor | None],
        beside: Sequence[Tensor | None],
        rows: Sequence[Tensor | None],
        shape: Sequence[int],
    ) -> None:
        self.launcher, total = Launcher(), places.total
        batch, heads, length, dim = shape
        keys = [y if x is None else x for x, y in zip(main[1:], beside)]
        sizes = [None if x is None else (x.shape[1], x.shape[3]) for x in keys]
        added = any(x is not None for x in rows)
        sizes.insert(0, (heads, dim) if added or main[0] is not None else None)
        self.laid = [None if x is None else _laid(batch, total, *x) for x in sizes]
        self.strides = [None if x is None else x.stride()[:3] for x in (*main, *beside)]
        self.by_token = places.by_token(batch) if added else []
        self.sizes = (length, total, *[1 if x is None else x[0] * x[1] for x in sizes])
        value = sizes[2] or (1,)
        self.constants = {"BLOCK": BLOCK, "D": dim, "DV": value[-1], "num_warps": 4}
        self.grid = (batch * total, 1 if sizes[1:] == [None, None] else 2)

    def __call__(
        self, tensors: Sequence[Tensor | None], rows: Sequence[Tensor | None], like: Tensor
    ) -> list[Tensor | None]:
        """Of main and then beside."""
        made = {"dtype": like.dtype, "device": like.device}
        to = [None if laid is None else torch.empty_strided(*laid, **made) for laid in self.laid]
        pairs = zip(tensors, self.strides)
        read = [None if x is None else Keys(x, *strides) for x, strides in pairs]
        found = [(x, *by) for x, by in zip(rows, self.by_token) if x is not None]
        tensors = tuple(to), tuple(read[:3]), tuple(read[3:]), tuple(found) or None
        self.launcher(_join_kernel, self.grid, (*tensors, *self.sizes), self.constants)
        return to


def join(
    places: Places,
    main: Sequence[Tensor | None],
    beside: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    shape: Sequence[int],
) -> list[Tensor | None]:
    """The gradients of the queries, keys and values [B, H, T, D] of all tokens, in one launch; in
    memory they lie as [B, T, H, D].

    Args:
        places: of the rows.
        main: those of the main pass's queries, keys and values [B, H, S, D], or None.
        beside: what ops beside it found for its keys and values, or None.
        rows: [N, Hq, D] of each selection, or None.
        shape: [B, Hq, S, D] of the main pass's queries.
    """
    tensors, key = (*main, *beside), signature((*main, *beside, *rows))
    launch, copied = places.launches.get(key, (None, True))
    if copied:
        tensors, given = [None if x is None else rows_contiguous(x) for x in tensors], tensors
        rows, taken = [None if x is None else aligned(x) for x in rows], rows
        if launch is None:
            launch = _Launch(places, tensors[:3], tensors[3:], rows, shape)
            pairs = zip((*tensors, *rows), (*given, *taken))
            places.launches[key] = launch, any(x is not y for x, y in pairs)
    return launch(tensors, rows, next(x for x in (*tensors, *rows) if x is not None))
