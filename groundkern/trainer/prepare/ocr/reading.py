"""An image in, words with box and confidence out, whatever the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image

from groundkern.trainer.data.images import SampleError, load_rgb, wrong
from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.cache import Readings
from groundkern.trainer.prepare.ocr.rotation import read_upright
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord

T = TypeVar("T")


def use_image(
    use: Callable[[Image.Image], T], path: Path, size: tuple[int, int], *, where: str, field: str
) -> T:
    """`use` of the decoded image of a sample; an error of it names the sample.

    Args:
        use: takes the RGB image; may raise a `SampleError` that does not name the sample.
        path, size: of the image.
        where, field: what starts the error message.

    Raises:
        SampleError: not decoded, or what `use` raised.
    """
    image = load_rgb(path, size, where=where, field=field)
    try:
        return use(image)
    except SampleError as error:
        raise wrong(where, field, "an image that can be read", f"{path.name!r} ({error})") from None


def read_words(image: Image.Image, settings: OcrSettings) -> list[OcrWord]:
    """The words of an image in reading order.

    Args:
        image: 8-bit RGB, of `groundkern.trainer.data.images.load_rgb`.
        settings: engine and options; an engine is started once per process.

    Raises:
        SampleError: the engine fails on this image; the caller adds which sample it is.
        ConfigError: the engine or its language is not installed.
    """
    large = image
    scale = engines.best_scale(settings, image.size)
    if scale != 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        large = image.resize(size, Image.Resampling.LANCZOS)
    words = []
    read = engines.engine(settings)
    if settings.rotation:
        found = read_upright(large, read, tells=engines.tells_turn(settings))
    else:
        found = read(large)
    for word in found:
        edges = [
            edge * side / full for edge, side, full in zip(word.box, image.size * 2, large.size * 2)
        ]
        x0, y0, x1, y1 = (
            min(max(edge, 0.0), float(side)) for edge, side in zip(edges, image.size * 2)
        )
        if word.text.strip() and x0 < x1 and y0 < y1:
            box = (round(x0, 2), round(y0, 2), round(x1, 2), round(y1, 2))
            words.append(word._replace(text=word.text.strip(), box=box))
    return words


def readings_of(
    path: Path,
    size: tuple[int, int],
    readings: Readings,
    *,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    where: str,
    field: str,
) -> tuple[list[OcrWord], bool]:
    """The words of an image of a sample, and whether they were read before.

    Args:
        path, size: of the image.
        readings: where they are kept, and how images are read.
        prepare: what is done to the decoded image before (`Readings.drawn` says so in a word).
        where, field: what starts the error message.

    Raises:
        SampleError: not decoded, or the engine fails on it.
        OSError: readings cannot be kept.
    """

    def read(image: Image.Image) -> list[OcrWord]:
        return read_words(prepare(image) if prepare else image, readings.settings)

    return readings.words(path, lambda: use_image(read, path, size, where=where, field=field))
