"""What a word read by OCR is, and the settings that decide how an image is read."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

LARGEST = 4000  # pixels of the longer side to which images are enlarged

Box = tuple[float, float, float, float]  # x0, y0, x1, y1: edges, in pixels


class OcrWord(NamedTuple):
    """A word as it was read.

    Args:
        text: without white space at its ends, never empty.
        box: (x0, y0, x1, y1) in pixels, edges, within the image.
        confidence: 0 to 1.
        line: words of one printed line share it; lines are numbered in reading order.
        turn: degrees, clockwise, by which the image would have to be turned for the word to
            stand upright; 0, 90, 180 or 270.
    """

    text: str
    box: Box
    confidence: float
    line: int
    turn: int = 0


Reader = Callable[[Image.Image], list[OcrWord]]


@dataclass(frozen=True)
class OcrSettings:
    """Which engine reads, and how.

    Args:
        engine: "rapid" (the package rapidocr), "tesseract" (the program; Debian package
            tesseract-ocr), "paddle" (PaddleOCR 3), or "auto": rapid where it is installed, else
            tesseract.
        language: as the engine names it ("eng+deu" for tesseract, "german" for the others); None:
            English, with rapid also Chinese and Japanese.
        page_mode: tesseract's page segmentation mode: 3 finds the layout by itself, 6 takes the
            image as one block of text, 11 looks for words anywhere; None: 3 or 11, whichever
            reads more.
        scale: images are enlarged by this factor before reading, never beyond `LARGEST`;
            None: as the engine reads best.
        rotation: pages that are turned by 90, 180 or 270 degrees are found and read upright.
    """

    engine: str = "auto"
    language: str | None = None
    page_mode: int | None = None
    scale: float | None = None
    rotation: bool = True

    @classmethod
    def of(cls, arguments: Namespace) -> OcrSettings:
        """The settings that `groundkern.trainer.prepare.arguments.add_reading` declares."""
        return cls(
            arguments.engine,
            arguments.language,
            arguments.page_mode,
            arguments.scale,
            arguments.rotation,
        )
