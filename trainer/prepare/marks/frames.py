"""Frames, axes, grid lines and bars, erased before a chart is read.

OCR engines take what a frame encloses for a picture and skip the short labels in it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CONTRAST = 24  # of 255, by which ink differs from the paper
SHARE = 12  # a run is long from this part of the image's longer side on


def without_lines(image: Image.Image) -> Image.Image:
    """The image with long horizontal and vertical runs of ink made paper.

    Args:
        image: 8-bit RGB; the paper is its median colour.

    Returns:
        An image of the same size, so that boxes on it are boxes on the first.
    """
    pixels = np.array(image)  # [H, W, 3]
    gray = np.asarray(image.convert("L")).astype(np.int16)
    ink = np.abs(gray - np.median(gray)) > CONTRAST
    length = max(8, max(image.size) // SHARE)
    long = _long_runs(ink, length) | _long_runs(ink.T, length).T
    pixels[long] = np.median(pixels.reshape(-1, 3)[:: max(1, gray.size // 100_000)], axis=0)
    return Image.fromarray(pixels)


def _long_runs(ink: np.ndarray, length: int) -> np.ndarray:
    """Which pixels of [H, W] lie in a horizontal run of at least `length`."""
    padded = np.pad(ink, ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(padded, axis=1)  # [H, W + 1]: 1 where a run starts, -1 after its end
    rows, starts = np.nonzero(steps == 1)
    _, stops = np.nonzero(steps == -1)  # in the same order: runs of a row do not overlap
    kept = stops - starts >= length
    marks = np.zeros(steps.shape, np.int8)
    marks[rows[kept], starts[kept]] = 1
    marks[rows[kept], stops[kept]] = -1
    return np.cumsum(marks, axis=1, dtype=np.int8)[:, :-1] > 0
