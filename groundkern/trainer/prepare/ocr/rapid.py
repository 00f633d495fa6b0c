"""RapidOCR: PP-OCR's detector and recogniser on onnxruntime, with the models of its wheel.

What it finds are lines: a quadrangle, a text, and where in the line the recogniser saw each
character. `groundkern.trainer.prepare.ocr.characters` makes words of these.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.ocr.characters import Crop, line_words
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord, Reader

TELLS_TURN = True  # its words say how they stand
# Longer sides, in pixels, to which smaller images are enlarged and larger ones reduced; the largest
# scale. Forms and receipts of 1,000 pixels are read better at 1,500 than at 2,000.
SIZES = (1500, 2000, 2.0)
SMALLEST = 64  # pixels of the shorter side; a strip gets a margin
TALL = 1.5  # a line this many times as high as wide is read from bottom to top


def installed() -> bool:
    """Whether rapidocr and what it runs on can be imported."""
    needed = ("rapidocr", "onnxruntime", "cv2")
    return all(importlib.util.find_spec(name) for name in needed)


def reader(settings: OcrSettings) -> Reader:
    """Reads images with RapidOCR, on one core.

    Args:
        settings: its `language` chooses the recogniser's model.

    Raises:
        ConfigError: a package or the model of the language is not installed.
    """
    engine = _engine(settings.language or "en")

    def read(image: Image.Image) -> list[OcrWord]:
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # BGR, as OpenCV reads
        height, width = pixels.shape[:2]
        down, right = max(0, SMALLEST - height), max(0, SMALLEST - width)
        if down or right:
            pixels = np.pad(pixels, ((0, down), (0, right), (0, 0)), "edge")
        found, classes, texts, crops = engine.run_ocr_steps(pixels, {})
        if found.boxes is None or texts.txts is None:
            return []
        turned = [_upside_down(each, engine) for each in classes.cls_res]
        lines = zip(found.boxes, crops, turned, texts.txts, texts.word_results, texts.scores)
        return list(_in_reading_order([_words(*line) for line in lines]))

    return read


def version() -> str:
    """Of the package."""
    return importlib.metadata.version("rapidocr")


def _engine(language: str) -> Any:
    if not installed():
        raise ConfigError(
            "RapidOCR is not installed (pip install rapidocr onnxruntime opencv-python-headless)"
        )
    import rapidocr

    return rapidocr.RapidOCR(
        params={
            **_models(language),
            "Global.log_level": "critical",
            "Global.use_preprocess_img": False,  # the caller decides on the size
            "Global.use_vertical_padding": False,
            "Global.return_word_box": True,
            "Det.limit_type": "max",
            "Det.limit_side_len": 10**6,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _models(language: str) -> dict[str, Any]:
    """The engine's parameters that name model files on this disk; it would download others."""
    import rapidocr
    from rapidocr.inference_engine.base import FileInfo, InferSession
    from rapidocr.utils.typings import EngineType, ModelType, OCRVersion, TaskType

    folder = Path(rapidocr.__file__).parent / "models"
    newest, before = (OCRVersion.PPOCRV6, ModelType.SMALL), (OCRVersion.PPOCRV5, ModelType.MOBILE)
    wanted = {
        "Det": (TaskType.DET, "ch", [newest]),
        "Cls": (TaskType.CLS, "ch", [(OCRVersion.PPOCRV4, ModelType.MOBILE)]),
        "Rec": (TaskType.REC, language, [newest, before]),
    }
    chosen: dict[str, Any] = {}
    for part, (task, spoken, versions) in wanted.items():
        refused = ""
        for version, size in versions:
            try:
                info = FileInfo(EngineType.ONNXRUNTIME, version, task, spoken, size)
                path = folder / Path(InferSession.get_model_url(info)["model_dir"]).name
                break
            except ValueError as error:
                refused = str(error)
        else:
            raise ConfigError(f"RapidOCR does not read the language {spoken!r} ({refused})")
        if not path.is_file():
            raise ConfigError(
                f"RapidOCR's model for the language {spoken!r} is not on this machine, and nothing "
                f"is downloaded: {path.name} is wanted in {folder}"
            )
        chosen |= {f"{part}.model_path": str(path), f"{part}.ocr_version": version}
        chosen |= {f"{part}.model_type": size, f"{part}.lang_type": spoken}
    return chosen


def _upside_down(found: tuple[str, float], engine: Any) -> bool:
    label, score = found
    return bool("180" in label and score > engine.cfg.Cls.cls_thresh)


def _words(
    quad: np.ndarray, pixels: np.ndarray, upside_down: bool, text: str, info: Any, score: float
) -> list[OcrWord]:
    """The words of a line that was found; they have no line number yet."""
    columns = [column for word in info.word_cols for column in word]
    letters = [(at, char) for at, char in enumerate(text) if not char.isspace()]
    if not columns or len(columns) != len(letters):
        return []
    sure = info.confs if len(info.confs) == len(text) else [score] * len(text)
    crop = Crop(quad, pixels, upside_down, TALL)
    centres = [(column + 0.5) / info.line_txt_len * crop.width for column in columns]
    words = []
    for part, box in line_words(crop, letters, centres):
        confidence = float(np.mean([sure[at] for at, _ in part]))
        words.append(OcrWord("".join(char for _, char in part), box, confidence, 0, crop.turn))
    return words


def _in_reading_order(lines: list[list[OcrWord]]) -> list[OcrWord]:
    """Rows from top to bottom, lines of a row from left to right; lines numbered anew."""
    rows: list[list[list[OcrWord]]] = []
    middle = lambda line: np.mean([word.box[1] + word.box[3] for word in line]) / 2  # noqa: E731
    lines = sorted((line for line in lines if line), key=middle)
    bottom = -np.inf
    for line in lines:
        if middle(line) > bottom:
            rows.append([])
            bottom = min(word.box[3] for word in line)
        rows[-1].append(line)
    ordered = [line for row in rows for line in sorted(row, key=lambda line: line[0].box[0])]
    return [word._replace(line=number) for number, line in enumerate(ordered) for word in line]
