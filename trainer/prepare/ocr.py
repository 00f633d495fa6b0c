"""Word-level OCR behind one small interface: an image in, words with box and confidence out."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from trainer.config import ConfigError
from trainer.data.images import SampleError, load_rgb, wrong
from trainer.prepare.reading import split_lines

T = TypeVar("T")
ENGINES = ("tesseract", "paddle")
LARGEST = 4000  # pixels of the longer side to which images are enlarged
SECONDS = 300  # that tesseract may take for one image


class OcrWord(NamedTuple):
    """A word as it was read.

    Args:
        text: without white space at its ends, never empty.
        box: (x0, y0, x1, y1) in pixels, edges, within the image.
        confidence: 0 to 1.
        line: words of one printed line share it; lines are numbered in reading order.
    """

    text: str
    box: tuple[float, float, float, float]
    confidence: float
    line: int


@dataclass(frozen=True)
class OcrSettings:
    """Which engine reads, and how.

    Args:
        engine: "tesseract" (the program; Debian package tesseract-ocr) or "paddle" (PaddleOCR 3).
        language: as the engine names it ("eng+deu" for tesseract, "german" for PaddleOCR); None:
            English.
        page_mode: tesseract's page segmentation mode: 3 finds the layout by itself, 6 takes the
            image as one block of text, 11 looks for words anywhere.
        scale: images are enlarged by this factor before reading; tesseract wants letters 20 to 40
            pixels high. Never beyond `LARGEST`.
    """

    engine: str = "tesseract"
    language: str | None = None
    page_mode: int = 3
    scale: float = 1.0

    @classmethod
    def of(cls, arguments: Namespace) -> OcrSettings:
        """The settings that `trainer.prepare.arguments.add_reading` declares."""
        return cls(arguments.engine, arguments.language, arguments.page_mode, arguments.scale)


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
        image: 8-bit RGB, of `trainer.data.images.load_rgb`.
        settings: engine and options; an engine is started once per process.

    Raises:
        SampleError: the engine fails on this image; the caller adds which sample it is.
        ConfigError: the engine or its language is not installed.
    """
    large = image
    scale = min(settings.scale, max(1.0, LARGEST / max(image.size)))
    if scale != 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        large = image.resize(size, Image.Resampling.LANCZOS)
    found = _engine(settings)(large)
    words = []
    for text, box, confidence, line in found:
        edges = [
            edge * side / full for edge, side, full in zip(box, image.size * 2, large.size * 2)
        ]
        x0, y0, x1, y1 = (
            min(max(edge, 0.0), float(side)) for edge, side in zip(edges, image.size * 2)
        )
        if text.strip() and x0 < x1 and y0 < y1:
            box = (round(x0, 2), round(y0, 2), round(x1, 2), round(y1, 2))
            words.append(OcrWord(text.strip(), box, confidence, line))
    return words


def check_engine(settings: OcrSettings) -> None:
    """Raises `ConfigError` if the engine or its language is not installed."""
    _engine(settings)


@cache
def _engine(settings: OcrSettings) -> Callable[[Image.Image], list[tuple]]:
    match settings.engine:
        case "tesseract":
            return _tesseract(settings)
        case "paddle":
            return _paddle(settings)
        case other:
            raise ConfigError(f"`engine`: expected {' or '.join(ENGINES)}, got {other!r}")


def _tesseract(settings: OcrSettings) -> Callable[[Image.Image], list[tuple]]:
    """The program itself, by its TSV output: no wrapper package, no temporary files."""
    program = shutil.which("tesseract")
    if program is None:
        raise ConfigError(
            "the program tesseract is not installed (Debian: apt-get install tesseract-ocr)"
        )
    language = settings.language or "eng"
    listed = subprocess.run([program, "--list-langs"], capture_output=True, text=True).stdout
    missing = [name for name in language.split("+") if name not in listed.split()[1:]]
    if missing:
        raise ConfigError(f"tesseract has no data for the language {missing[0]!r}")
    command = [program, "stdin", "stdout", "-l", language, "--psm", str(settings.page_mode), "tsv"]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # one core per process

    def read(image: Image.Image) -> list[tuple]:
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        try:
            done = subprocess.run(
                command,
                input=buffer.getvalue(),
                capture_output=True,
                env=environment,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise SampleError(f"tesseract took more than {SECONDS} s") from None
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise SampleError(f"tesseract failed: {said[-200:]}")
        return list(_tsv_words(done.stdout.decode("utf-8", "replace")))

    return read


def _tsv_words(text: str) -> Iterator[tuple]:
    """(text, box, confidence, line) of the words in tesseract's table.

    Raises:
        SampleError: a row that is not one of tesseract's.
    """
    lines: dict[tuple, int] = {}
    head, *rows = split_lines(text) or [""]
    names = head.split("\t")
    for line in rows:
        cells = line.split("\t")
        row = dict(zip(names, cells))
        if row.get("level") != "5":
            continue
        try:
            place = (row["block_num"], row["par_num"], row["line_num"])
            x, y, width, height = (int(row[name]) for name in ("left", "top", "width", "height"))
            confidence = min(1.0, max(0.0, float(row["conf"]) / 100))
            box = (x, y, x + width, y + height)
            yield row["text"], box, confidence, lines.setdefault(place, len(lines))
        except (KeyError, ValueError):
            raise SampleError(f"tesseract printed no row of a word: {line[:200]!r}") from None


def _paddle(settings: OcrSettings) -> Callable[[Image.Image], list[tuple]]:
    """PaddleOCR 3 with word boxes. Its confidence is that of the word's line."""
    try:
        from paddleocr import PaddleOCR
    except ImportError:
        raise ConfigError(
            "PaddleOCR is not installed (pip install paddleocr paddlepaddle)"
        ) from None
    engine = PaddleOCR(
        lang=settings.language or "en",
        return_word_box=True,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,  # both would move the words
        use_textline_orientation=False,
    )

    def read(image: Image.Image) -> list[tuple]:
        try:
            (found,) = engine.predict(np.asarray(image)[..., ::-1].copy())  # BGR, as OpenCV reads
        except KeyError as error:  # PaddleX up to 3.3 on an image without text
            if "text_word_region" in str(error):
                return []
            raise
        lines = zip(
            found["rec_texts"], found["rec_scores"], found["text_word"], found["text_word_region"]
        )
        return [
            (text, box, float(score), number)
            for number, (printed, score, pieces, regions) in enumerate(lines)
            for text, box in _joined(printed, pieces, regions)
        ]

    return read


def _joined(printed: str, pieces: Sequence[str], regions: Sequence) -> Iterator[tuple[str, tuple]]:
    """The words of a line: PaddleOCR splits at punctuation, people at white space.

    Pieces follow one another in the printed line; a run of symbols is one piece, spaces included.
    Wide characters (Chinese, say) come one by one and stay so.
    """
    words: list[tuple[str, tuple, bool]] = []  # text, box, whether the next piece may join
    at = 0
    for piece, region in zip(pieces, regions):
        xs, ys = zip(*region)
        left, step = min(xs), (max(xs) - min(xs)) / max(1, len(piece))
        for part in re.finditer(r"\S+", piece):
            text = part.group()
            box = (left + step * part.start(), min(ys), left + step * part.end(), max(ys))
            start = printed.find(text, at)
            touches = start == at
            at = at if start < 0 else start + len(text)
            joins = len(text) > 1 or unicodedata.east_asian_width(text) not in "WF"
            if words and words[-1][2] and joins and touches:
                before, other, _ = words.pop()
                text, box = (
                    before + text,
                    (*map(min, other[:2], box[:2]), *map(max, other[2:], box[2:])),
                )
            words.append((text, box, joins))
    return ((text, box) for text, box, _ in words)
