"""Tesseract: the program itself, by its TSV output; no wrapper package, no temporary files."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
from collections.abc import Iterator

from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.ocr.quality import worth
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord, Reader
from groundkern.trainer.prepare.reading import split_lines

TELLS_TURN = False
# Longer sides, in pixels, to which smaller images are enlarged and larger ones reduced; the largest
# scale: it wants letters 20 to 40 pixels high.
SIZES = (2400, math.inf, 3.0)
MODES = (3, 11)  # a page with columns and paragraphs; words anywhere, as on forms and receipts
SECONDS = 300  # that it may take for one image


def reader(settings: OcrSettings) -> Reader:
    """Reads images with the program, on one core.

    Args:
        settings: `language` and `page_mode`.

    Raises:
        ConfigError: the program or the data of a language is not installed.
    """
    program = shutil.which("tesseract")
    if program is None and settings.engine == "auto":
        raise ConfigError(
            "no engine that reads words is installed: neither RapidOCR (pip install rapidocr "
            "onnxruntime opencv-python-headless) nor tesseract (Debian: apt-get install "
            "tesseract-ocr)"
        )
    if program is None:
        raise ConfigError(
            "the program tesseract is not installed (Debian: apt-get install tesseract-ocr)"
        )
    language = settings.language or "eng"
    listed = subprocess.run([program, "--list-langs"], capture_output=True, text=True).stdout
    missing = [name for name in language.split("+") if name not in listed.split()[1:]]
    if missing:
        raise ConfigError(f"tesseract has no data for the language {missing[0]!r}")
    modes = MODES if settings.page_mode is None else (settings.page_mode,)

    def read(image: Image.Image) -> list[OcrWord]:
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        readings = []
        for mode in modes:
            command = [program, "stdin", "stdout", "-l", language, "--psm", str(mode), "tsv"]
            readings.append(list(tsv_words(_printed(command, buffer.getvalue()))))
        return max(readings, key=worth)

    return read


def version() -> str:
    """As the program prints it."""
    said = subprocess.run([shutil.which("tesseract") or "", "--version"], capture_output=True)
    return said.stdout.decode(errors="replace").partition("\n")[0]


def _printed(command: list[str], image: bytes) -> str:
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # one core per process
    try:
        done = subprocess.run(
            command, input=image, capture_output=True, env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise SampleError(f"tesseract took more than {SECONDS} s") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise SampleError(f"tesseract failed: {said[-200:]}")
    return done.stdout.decode("utf-8", "replace")


def tsv_words(text: str) -> Iterator[OcrWord]:
    """The words in tesseract's table.

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
            yield OcrWord(row["text"], box, confidence, lines.setdefault(place, len(lines)))
        except (KeyError, ValueError):
            raise SampleError(f"tesseract printed no row of a word: {line[:200]!r}") from None
