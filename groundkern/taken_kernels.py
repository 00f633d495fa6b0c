"""The Triton kernel that joins the gradients of the main pass with those of rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from groundkern.calls import signature
from groundkern.tile_kernels import Keys, wide
from groundkern.tiles import Launcher, aligned, helper, kernel, rows_contiguous

if TYPE_CHECKING:
    from groundkern.taken import Places

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
            for i in range(tl.load(rows[1] + token), tl.load(rows[1] + token + 1)):
                at = wide(tl.load(rows[2] + i)) * elements + e
                x += tl.load(rows[0] + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(to_ptr + wide(token) * elements + e, x.to(to_ptr.dtype.element_ty), mask=mask)


@kernel
def _join_kernel(
    to,  # (q, k, v): [B, T, H, D], or None
    main,  # (q, k, v): `Keys` or None
    beside,  # (k, v): `Keys` or None
    rows,  # ([N, Hq, D], int32 [B * T + 1], int32 [N]) as `Places.by_token`, or None
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


class _Launch:
    """What is launched for gradients of a signature."""

    def __init__(
        self,
        places: Places,
        main: Sequence[Tensor | None],
        beside: Sequence[Tensor | None],
        rows: Tensor | None,
        shape: Sequence[int],
    ) -> None:
        self.launcher, total = Launcher(), places.total
        batch, _, length, dim = shape
        keys = [y if x is None else x for x, y in zip(main[1:], beside)]
        self.shapes = [None if x is None else (batch, total, x.shape[1], x.shape[3]) for x in keys]
        there = main[0] is not None or rows is not None
        self.shapes.insert(0, (batch, total, shape[1], dim) if there else None)
        self.strides = [None if x is None else x.stride()[:3] for x in (*main, *beside)]
        elements = [1 if x is None else x[2] * x[3] for x in self.shapes]
        self.sizes = (length, total, *elements)
        self.by_token = None if rows is None else places.by_token(batch)
        value = 1 if self.shapes[2] is None else self.shapes[2][3]
        self.constants = {"BLOCK": BLOCK, "D": dim, "DV": value, "num_warps": 4}
        self.grid = (batch * total, 1 if keys == [None, None] else 2)

    def __call__(
        self,
        main: Sequence[Tensor | None],
        beside: Sequence[Tensor | None],
        rows: Tensor | None,
        like: Tensor,
    ) -> list[Tensor | None]:
        to = [None if shape is None else like.new_empty(shape) for shape in self.shapes]
        read = [
            None if x is None else Keys(x, *strides)
            for x, strides in zip((*main, *beside), self.strides)
        ]
        of_rows = None if rows is None else (rows, *self.by_token)
        arguments = (tuple(to), tuple(read[:3]), tuple(read[3:]), of_rows, *self.sizes)
        self.launcher(_join_kernel, self.grid, arguments, self.constants)
        return to


def join(
    places: Places,
    main: Sequence[Tensor | None],
    beside: Sequence[Tensor | None],
    rows: Tensor | None,
    shape: Sequence[int],
) -> list[Tensor | None]:
    """The gradients of the queries, keys and values [B, T, H, D] of all tokens, in one launch.

    Args:
        places: of the rows.
        main: those of the main pass's queries, keys and values [B, H, S, D], or None.
        beside: what ops beside it found for its keys and values, or None.
        rows: [N, Hq, D], or None.
        shape: [B, Hq, S, D] of the main pass's queries.
    """
    tensors = [None if x is None else rows_contiguous(x) for x in (*main, *beside)]
    rows = None if rows is None else aligned(rows)
    like = next(x for x in (*tensors, rows) if x is not None)
    key = signature((*tensors, rows))
    launch = places.launches.get(key)
    if launch is None:
        launch = places.launches[key] = _Launch(places, tensors[:3], tensors[3:], rows, shape)
    return launch(tensors[:3], tensors[3:], rows, like)
