"""Masks and heat-maps of an image, and how much of each rectangle one covers, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern.checks import fail, require

HOT = 0.5
"""Of a heat's maximum: pixels at least this hot are inside where a set is wanted (its full width at
half maximum)."""


@dataclass(frozen=True, eq=False)
class Raster:
    """A mask or a heat-map that is stretched over a whole image, whatever its resolution.

    Args:
        values: [height, width], from the top. bool: a mask, True inside. Floating: a heat >= 0 in
            any unit, of which only the ratios count.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, a mask with nothing inside, a heat that is nowhere above 0, or
            values that are negative or not finite.
    """

    values: Tensor

    def __post_init__(self) -> None:
        values = self.values
        if not isinstance(values, Tensor):
            fail("raster", "a tensor [height, width]", type(values).__name__, TypeError)
        if values.dtype != torch.bool and not values.is_floating_point():
            fail("raster", "bool (a mask) or floating (a heat)", values.dtype, TypeError)
        plane = values.dim() == 2 and values.numel() > 0
        require(plane, "raster", "[height, width], 1 x 1 at least", list(values.shape))
        if self.heat:
            low, high = float(values.min()), float(values.max())
            require(low >= 0 and high < float("inf"), "heat", "finite numbers >= 0",
                    f"{low} to {high}")  # fmt: skip
            require(high > 0, "heat", "a number above 0", "zeros")
        else:
            require(bool(values.any()), "mask", "a pixel inside", "none")

    @property
    def heat(self) -> bool:
        """Whether it is a heat-map, not a mask."""
        return self.values.dtype != torch.bool

    def mask(self) -> Raster:
        """Where it is, as a set of pixels.

        Returns:
            Itself if it is a mask; of a heat the mask of where it has `HOT` of its maximum or more.
        """
        return Raster(self.values >= HOT * self.values.max()) if self.heat else self

    def bounds(self) -> tuple[float, float, float, float]:
        """The smallest box around what is not 0.

        Returns:
            (x0, y0, x1, y1) in fractions of the image.
        """
        inside = self.values > 0 if self.heat else self.values
        height, width = inside.shape
        rows, columns = (inside.any(axis).nonzero()[:, 0] for axis in (1, 0))
        low = int(columns[0]) / width, int(rows[0]) / height
        return *low, (int(columns[-1]) + 1) / width, (int(rows[-1]) + 1) / height


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
