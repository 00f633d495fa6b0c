"""PaddleOCR 3 with its word boxes, and the models that are on this machine."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.ocr.scripts import ALONE
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord, Reader

TELLS_TURN = False
# Longer sides, in pixels, to which smaller images are enlarged and larger ones reduced; the largest
# scale.
SIZES = (0, 2000, 1.0)


def reader(settings: OcrSettings) -> Reader:
    """Reads images with PaddleOCR. The confidence of a word is that of its line.

    Args:
        settings: its `language` chooses the models.

    Raises:
        ConfigError: the packages or the models of the language are not installed.
    """
    engine = _engine(settings.language or "en")

    def read(image: Image.Image) -> list[OcrWord]:
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
            OcrWord(text, box, float(score), number)
            for number, (printed, score, pieces, regions) in enumerate(lines)
            for text, box in joined(printed, pieces, regions)
        ]

    return read


def _engine(language: str) -> Any:
    """PaddleOCR with its models by name and folder: without these it would fetch them."""
    try:
        from paddleocr import PaddleOCR
        from paddlex.utils.cache import CACHE_DIR
    except ImportError:
        raise ConfigError(
            "PaddleOCR is not installed (pip install paddleocr paddlepaddle)"
        ) from None
    detector, recogniser = PaddleOCR._get_ocr_model_names(None, language, None)
    if recogniser is None:
        raise ConfigError(f"PaddleOCR does not read the language {language!r}")
    models = Path(CACHE_DIR) / "official_models"
    for name in (detector, recogniser):
        if not (models / name).is_dir():
            raise ConfigError(
                f"PaddleOCR's model for the language {language!r} is not on this machine, and "
                f"nothing is downloaded: the folder {name} is wanted in {models}"
            )
    return PaddleOCR(
        text_detection_model_name=detector,
        text_detection_model_dir=str(models / detector),
        text_recognition_model_name=recogniser,
        text_recognition_model_dir=str(models / recogniser),
        return_word_box=True,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,  # both would move the words
        use_textline_orientation=False,
    )


def version() -> str:
    """Of the package."""
    return importlib.metadata.version("paddleocr")


def joined(printed: str, pieces: Sequence[str], regions: Sequence) -> Iterator[tuple[str, tuple]]:
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
            joins = len(text) > 1 or not ALONE.match(text)
            if words and words[-1][2] and joins and touches:
                before, other, _ = words.pop()
                text, box = (
                    before + text,
                    (*map(min, other[:2], box[:2]), *map(max, other[2:], box[2:])),
                )
            words.append((text, box, joins))
    return ((text, box) for text, box, _ in words)
