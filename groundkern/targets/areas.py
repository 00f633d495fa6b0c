"""How much of each rectangle a raster covers, exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def covered(values: Tensor, rects: Tensor) -> Tensor:
    """Integrate a raster over rectangles, whose edges need not fall on those of its pixels.

    Sums over whole rows and columns of pixels, as in a summed-area table of the rows in which an
    edge lies, and fractions of the rows and columns at the four edges. Of a mask every sum is an
    exact integer. O(pixels + rectangles).

    Args:
        values: [height, width] bool or floating, over the unit square.
        rects: [n, 4] fp64 (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1; what is outside of the unit
            square has the value 0.

    Returns:
        [n] fp64: the integral, in units of the unit square's area.
    """
    height, width = values.shape
    x, y = rects.reshape(-1, 2, 2).clamp(0.0, 1.0).unbind(-1)  # [n, 2]
    x, y = x * width, y * height
    column, row = x.floor().clamp_max(width - 1), y.floor().clamp_max(height - 1)
    right, below = x - column, y - row  # how far into its pixel an edge is, 0 to 1
    column, row = column.long(), row.long()
    needed = torch.cat([row, row + 1]).unique()
    above = torch.zeros(len(needed), width + 1, dtype=torch.float64)  # [k, width + 1]
    mask = values.dtype == torch.bool
    # a count of pixels in a column is exact in fp32, and half as dear
    values, dtype = (values.view(torch.uint8), torch.float32) if mask else (values, torch.float64)
    for k, (start, stop) in enumerate(zip(needed[:-1].tolist(), needed[1:].tolist())):
        above[k + 1, 1:] = values[start:stop].sum(0, dtype=dtype)
    above = above.cumsum(0).cumsum(1)  # what lies above a needed row and left of a column
    at = torch.searchsorted(needed, row)  # the row below it is the next one

    def between(k: Tensor) -> Tensor:  # [n]: above row k, from the left edge to the right one
        left = above[k, column[:, 0]]
        found = above[k, column[:, 1]] - left
        found += right[:, 1] * (above[k, column[:, 1] + 1] - above[k, column[:, 1]])
        return found - right[:, 0] * (above[k, column[:, 0] + 1] - left)

    top, bottom = between(at[:, 0]), between(at[:, 1])
    total = bottom - top + below[:, 1] * (between(at[:, 1] + 1) - bottom)
    total -= below[:, 0] * (between(at[:, 0] + 1) - top)
    return total / (height * width)
