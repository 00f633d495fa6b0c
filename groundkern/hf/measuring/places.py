"""Pixel to place: which part of which original image each number that a processor returns shows.

The processor is given images that encode coordinates. White ones, one after the other, tell which
numbers show which image and which are padding; ramps along x and along y tell where. One ramp has
only 256 levels, so a long side has several, each climbing over a part of the image and flat
elsewhere: their sum climbs over all of it. Resizing, cropping, padding and tiling are linear in the
pixels, so each number of the sum is the mean position of the pixels that it is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.calling import sample
from groundkern.hf.data.geometry.views import Size

SLOPE = 2  # levels of brightness to a pixel; a resized picture is rounded to whole levels
LEVELS = 255
PICTURE = 0.5  # of the largest change from black to white: what changes less is padding


class Places(NamedTuple):
    """The places of the numbers in one float tensor, each with the shape of that tensor.

    Args:
        image: int16, the index of the image that a number shows; -1: padding.
        x, y: fp32, the middle of what it shows, in pixels of that image.
    """

    image: Tensor
    x: Tensor
    y: Tensor


def places_of(
    processor: Any, sizes: Sequence[Size]
) -> tuple[dict[str, Any], dict[str, Places], float]:
    """Measure where in the images each number of the processor's float tensors is from.

    Args:
        processor: the model's.
        sizes: (width, height) of each image of a sample, in pixels.

    Returns:
        What it returns for black images; the places in each float tensor, by its name; pixels by
        which a place may be wrong.

    Raises:
        ValueError: a processor whose pixels do not depend on the images' pixels in a linear way,
            or whose layout depends on them.
    """
    black = [np.zeros((height, width), np.uint8) for width, height in sizes]
    probe = _Probe(processor, black)
    shown = {name: torch.full(x.shape, -1, dtype=torch.int16) for name, x in probe.black.items()}
    ranges = {name: torch.ones_like(x) for name, x in probe.black.items()}
    for index in range(len(sizes)):
        white = [np.full_like(x, LEVELS * (i == index)) for i, x in enumerate(black)]
        for name, change in probe.changes(white).items():
            mine = change.abs() > PICTURE * change.abs().amax()
            shown[name][mine], ranges[name][mine] = index, change[mine]
    any_shown = any(bool((image >= 0).any()) for image in shown.values())
    require(any_shown, "processor", "pixels that depend on the image", "others")
    grey = probe.changes([np.full_like(x, LEVELS // 2) for x in black])
    wanted = LEVELS // 2 / LEVELS
    for name, image in shown.items():
        off = (grey[name] / ranges[name] - wanted)[image >= 0].abs()
        good = off.numel() == 0 or float(off.amax()) < 4 / LEVELS
        require(good, f"processor: {name}", "pixels linear in those of the image", "others")
    x = _positions(probe, shown, ranges, sizes, axis=0)
    y = _positions(probe, shown, ranges, sizes, axis=1)
    found = {name: Places(shown[name], x[name], y[name]) for name in shown}
    return probe.batch, found, 0.5 / min(_slope(side) for size in sizes for side in size)


class _Probe:
    """Calls a processor and compares with what it returned for black images."""

    def __init__(self, processor: Any, black: list[np.ndarray]) -> None:
        self._processor = processor
        self.batch = self._run(black)
        self.black = {k: x for k, x in self.batch.items() if _is_float(x)}
        require(bool(self.black), "processor", "a float tensor of pixels", sorted(self.batch))

    def changes(self, images: list[np.ndarray]) -> dict[str, Tensor]:
        """By how much each float tensor differs from that of black images."""
        batch = self._run(images)
        same = batch.keys() == self.batch.keys() and all(map(self._alike, batch, batch.values()))
        require(same, "processor", "a layout that depends on images' sizes alone", "another one")
        return {name: batch[name].float() - x.float() for name, x in self.black.items()}

    def _alike(self, name: str, value: Any) -> bool:
        before = self.batch[name]
        if _is_float(value):
            return _is_float(before) and value.shape == before.shape
        if isinstance(value, Tensor):
            return isinstance(before, Tensor) and torch.equal(value, before)
        return True

    def _run(self, images: list[np.ndarray]) -> dict[str, Any]:
        rgb = [Image.fromarray(np.repeat(image[..., None], 3, 2)) for image in images]
        return sample(self._processor, rgb)


def _positions(
    probe: _Probe,
    shown: Mapping[str, Tensor],
    ranges: Mapping[str, Tensor],
    sizes: Sequence[Size],
    *,
    axis: int,
) -> dict[str, Tensor]:
    """Positions along x (axis 0) or y (axis 1), in pixels of the image that is shown."""
    ramps = [_ramps(size, axis) for size in sizes]
    total = {name: torch.zeros_like(x) for name, x in ranges.items()}
    for step in range(max(map(len, ramps))):
        # an image with fewer ramps than another stays black, which adds nothing
        images = [r[step] if step < len(r) else np.zeros_like(r[0]) for r in ramps]
        for name, change in probe.changes(images).items():
            total[name] += change / ranges[name]
    pixels = torch.tensor([LEVELS / _slope(size[axis]) for size in sizes])
    return {name: x * pixels[shown[name].clamp_min(0).long()] + 0.5 for name, x in total.items()}


def _ramps(size: Size, axis: int) -> list[np.ndarray]:
    """Images whose levels add up to the slope times the pixel's index."""
    side = size[axis]
    climbed = _slope(side) * np.arange(side)
    steps = range(0, max(int(climbed[-1]), 1), LEVELS)
    lines = [(climbed - step).clip(0, LEVELS).astype(np.uint8) for step in steps]
    return [np.broadcast_to(x if axis == 0 else x[:, None], size[::-1]) for x in lines]


def _slope(side: int) -> int:
    return max(SLOPE, LEVELS // side)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
