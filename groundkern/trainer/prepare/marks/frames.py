"""Frames, axes, grid lines and bars, erased before a chart is read.

Tesseract treats what a frame encloses as a picture and skips the short labels in it; RapidOCR
does not, and loses letters that are erased with a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from groundkern.trainer.prepare.ocr.cache import Readings
from groundkern.trainer.prepare.ocr.engines import chosen
from groundkern.trainer.prepare.ocr.reading import read_words, readings_of
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord

CONTRAST = 24  # of 255, by which ink differs from the paper
SHARE = 12  # a run is long from 1 / SHARE of the image's longer side
STUB = 80  # what touches a long line is erased too, up to 1 / STUB of the longer side


def read_chart(image: Image.Image, ocr: OcrSettings, *, keep_lines: bool = False) -> list[OcrWord]:
    """The words of a chart, of which tesseract gets a copy without lines.

    Args:
        image: 8-bit RGB.
        ocr: how to read.
        keep_lines: tesseract gets the image as it is.

    Raises:
        SampleError, ConfigError: as `groundkern.trainer.prepare.ocr.reading.read_words`.
    """
    return read_words(image if keep_lines or not _erased(ocr) else without_lines(image), ocr)


@dataclass(frozen=True)
class ChartReadings:
    """Charts read as `read_chart` does, each image once for all samples that show it.

    Args:
        output: of the command; readings are kept beside it.
        ocr: how to read.
        keep_lines: tesseract gets the image as it is.
    """

    output: Path
    ocr: OcrSettings
    keep_lines: bool = False

    def words(
        self, path: Path, size: tuple[int, int], *, where: str, field: str
    ) -> tuple[list[OcrWord], bool]:
        """The words of an image of a sample, and whether they were read before.

        Args:
            path, size: of the image.
            where, field: what starts the error message.

        Raises:
            SampleError, OSError: as `groundkern.trainer.prepare.ocr.reading.readings_of`.
            ConfigError: the engine or its language is not installed. A command whose samples all
                have words needs none, so this is found with the first image.
        """
        erase = not self.keep_lines and _erased(self.ocr)
        readings = _beside(self.output, self.ocr, "without lines" if erase else "")
        prepare = without_lines if erase else None
        return readings_of(path, size, readings, prepare=prepare, where=where, field=field)


_beside = cache(Readings.beside)  # once a process: it asks the engine for its version


def _erased(ocr: OcrSettings) -> bool:
    return chosen(ocr) == "tesseract"


def without_lines(image: Image.Image) -> Image.Image:
    """The image with long horizontal and vertical runs of ink painted over in the paper's colour.

    Args:
        image: 8-bit RGB; the paper is its median colour.

    Returns:
        An image of the same size, so boxes on it fit the original.
    """
    pixels = np.array(image)  # [H, W, 3]
    gray = np.asarray(image.convert("L")).astype(np.int16)
    ink = np.abs(gray - np.median(gray)) > CONTRAST
    side = max(image.size)
    long = _long_runs(ink, max(8, side // SHARE)) | _long_runs(ink.T, max(8, side // SHARE)).T
    stub = max(3, side // STUB)
    gone = long | _stubs(ink, long, stub) | _stubs(ink.T, long.T, stub).T
    paper = np.median(pixels.reshape(-1, 3)[:: max(1, gray.size // 100_000)], axis=0)
    pixels[gone] = paper
    return Image.fromarray(pixels)


def _long_runs(ink: np.ndarray, length: int) -> np.ndarray:
    """Which pixels of [H, W] lie in a horizontal run of at least `length`."""
    rows, starts, stops = _runs(ink)
    long = stops - starts >= length
    return _filled(ink.shape, rows[long], starts[long], stops[long])


def _stubs(ink: np.ndarray, long: np.ndarray, length: int) -> np.ndarray:
    """Pixels of short horizontal runs that touch a long line: ticks, and the line's soft edge."""
    rows, starts, stops = _runs(ink & ~long)
    before = np.pad(long, ((0, 0), (1, 0)))[rows, starts]
    after = np.pad(long, ((0, 0), (0, 1)))[rows, stops]
    short = (stops - starts <= length) & (before | after)
    return _filled(ink.shape, rows[short], starts[short], stops[short])


def _runs(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, starts and stops of all horizontal runs of [H, W]."""
    steps = np.diff(np.pad(ink, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]  # in the same order: runs do not overlap


def _filled(shape: tuple, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    marks = np.zeros((shape[0], shape[1] + 1), np.int8)
    marks[rows, starts] = 1
    marks[rows, stops] = -1
    return np.cumsum(marks, axis=1, dtype=np.int8)[:, :-1] > 0
