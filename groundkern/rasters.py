"""Masks and heat-maps over a whole image; without torch until one is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from groundkern.messages import fail, require

if TYPE_CHECKING:
    from torch import Tensor

HOT = 0.5
"""Of a heat's maximum: pixels at least this hot are inside where a set is wanted (its full width at
half maximum)."""


@dataclass(frozen=True, eq=False)
class Raster:
    """A mask or a heat-map that is stretched over a whole image, whatever its resolution.

    Args:
        values: [height, width], from the top. bool: a mask, True inside. Floating: a heat >= 0 in
            any unit, of which only the ratios count.
        peak: of a heat that is one of several: the maximum of them all, so that their ratios count
            too. None: its own maximum.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, a mask with nothing inside, a heat that is nowhere above 0,
            values that are negative or not finite, or a peak below a heat's maximum.
    """

    values: Tensor
    peak: float | None = None

    def __post_init__(self) -> None:
        import torch

        values = self.values
        if not isinstance(values, torch.Tensor):
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
            most = high if self.peak is None else self.peak
            require(high <= most < float("inf"), "peak", f"the heat's {high} or more", most)
        else:
            require(self.peak is None, "peak", "None for a mask", self.peak)
            require(bool(values.any()), "mask", "a pixel inside", "none")

    @property
    def heat(self) -> bool:
        """Whether it is a heat-map, not a mask."""
        return self.values.is_floating_point()

    @property
    def most(self) -> float:
        """What a pixel has that counts in full: of a heat its peak, of a mask 1."""
        return float(self.values.max()) if self.peak is None else self.peak

    def mask(self) -> Raster | None:
        """Where it is, as a set of pixels.

        Returns:
            Itself if it is a mask; of a heat the mask of where it has `HOT` of its peak or more,
            None if that is nowhere.
        """
        if not self.heat:
            return self
        hot = self.values >= HOT * self.most
        return Raster(hot) if bool(hot.any()) else None

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
