"""The cells of a view that its tokens stand for, in fractions of the view."""

from __future__ import annotations

import torch
from torch import Tensor


def even(tokens: int) -> Tensor:
    """Cells of one size along a side: fp64 [tokens, 2] (low, high).

    Args:
        tokens: along the side.
    """
    edges = torch.arange(tokens + 1, dtype=torch.float64) / tokens
    return torch.stack([edges[:-1], edges[1:]], 1)


def strided(tokens: int, stride: float, inputs: float) -> Tensor:
    """Cells of convolutions of stride 2 with odd kernels and half as much padding, along a side.

    Output i sees inputs around input `stride` i, not around the middle of the `stride` inputs from
    there on. A place belongs to the token whose middle is nearest.

    Args:
        tokens: along the side.
        stride: of all convolutions together.
        inputs: of the first convolution along the side, in the unit of `stride`.

    Returns:
        fp64 [tokens, 2] (low, high).
    """
    inner = stride * torch.arange(1, tokens, dtype=torch.float64) + (1 - stride) / 2
    edges = torch.cat([inner.new_zeros(1), inner / inputs, inner.new_ones(1)])
    return torch.stack([edges[:-1], edges[1:]], 1)


def pooled(patches: int, size: int) -> Tensor:
    """Cells of windows of `size` patches along a side, which stand in the middle of whole windows.

    Args:
        patches: along the side.
        size: of a window.

    Returns:
        fp64 [ceil(patches / size), 2] (low, high), within [0, 1].
    """
    tokens = -(-patches // size)
    before = (tokens * size - patches) // 2
    return ((even(tokens) * tokens * size - before) / patches).clamp(0, 1)


def repeated(cells: Tensor, tiles: int) -> Tensor:
    """The cells along a row of equal tiles.

    Args:
        cells: [n, 2] of one tile.
        tiles: how many.

    Returns:
        [tiles n, 2].
    """
    return torch.cat([(cells + tile) / tiles for tile in range(tiles)])


def grid(columns: Tensor, rows: Tensor) -> Tensor:
    """Every row of cells with every column, row by row.

    Args:
        columns: [c, 2] (low, high) along x.
        rows: [r, 2] along y.

    Returns:
        [r c, 4] (x0, y0, x1, y1).
    """
    x = columns.expand(len(rows), -1, -1)
    y = rows[:, None].expand(-1, len(columns), -1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).flatten(0, 1)


def placed(cells: Tensor, view: tuple[float, float, float, float]) -> Tensor:
    """The cells of a view that shows the rectangle `view` of the image.

    Args:
        cells: [n, 4] in fractions of the view.
        view: (x0, y0, x1, y1) in fractions of the image.

    Returns:
        [n, 4] in fractions of the image.
    """
    x0, y0, x1, y1 = view
    size = torch.tensor([x1 - x0, y1 - y0] * 2, dtype=torch.float64)
    return cells * size + torch.tensor([x0, y0] * 2, dtype=torch.float64)


def centred(rects: Tensor, canvas: tuple[int, int], shown: tuple[int, int]) -> Tensor:
    """Cells of a canvas with the whole image in its middle.

    Args:
        rects: [..., 4] in fractions of the canvas.
        canvas: its (width, height) in pixels.
        shown: (width, height) of the image on it; an odd pixel of padding is at the right or below.

    Returns:
        [..., 4] in fractions of the image.
    """
    before = [(whole - part) // 2 for whole, part in zip(canvas, shown)]
    whole, offset, part = (
        torch.tensor([*pair, *pair], dtype=torch.float64) for pair in (canvas, before, shown)
    )
    return (rects * whole - offset) / part


def without_place(tokens: int) -> Tensor:
    """Tokens without a place, such as newlines: fp64 [tokens, 4] of -1."""
    return torch.full((tokens, 4), -1.0, dtype=torch.float64)


def with_newlines(rows: Tensor) -> Tensor:
    """Rows of cells that each end in a newline token.

    Args:
        rows: [rows, columns, 4].

    Returns:
        [rows (columns + 1), 4].
    """
    ends = without_place(len(rows))[:, None]
    return torch.cat([rows, ends], 1).flatten(0, 1)
