"""Which engine serves a reading: modules with `reader`, and `SIZES` they read best at."""

from __future__ import annotations

from functools import cache

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.arguments import ENGINES
from groundkern.trainer.prepare.ocr.settings import LARGEST, OcrSettings, Reader


def chosen(settings: OcrSettings) -> str:
    """The engine's name; of "auto" the one that is installed, RapidOCR first."""
    if settings.engine != "auto":
        return settings.engine
    from groundkern.trainer.prepare.ocr import rapid

    return "rapid" if rapid.installed() else "tesseract"


@cache
def engine(settings: OcrSettings) -> Reader:
    """The engine of the settings, started once per process.

    Raises:
        ConfigError: it or its language is not installed.
    """
    return _module(settings).reader(settings)


def best_scale(settings: OcrSettings, size: tuple[int, int]) -> float:
    """By how much an image is enlarged: as the settings say, or as the engine reads best."""
    if settings.scale is not None:
        return min(settings.scale, max(1.0, LARGEST / max(size)))
    small, large, most = _module(settings).SIZES
    return min(most, max(1.0, small / max(size)), large / max(size))


def tells_turn(settings: OcrSettings) -> bool:
    """Whether the engine's words say how they stand (`OcrWord.turn`)."""
    return _module(settings).TELLS_TURN


def version(settings: OcrSettings) -> str:
    """The engine's name and version, by which readings are told apart."""
    return f"{chosen(settings)} {_module(settings).version()}"


def _module(settings: OcrSettings):
    match chosen(settings):
        case "rapid":
            from groundkern.trainer.prepare.ocr import rapid as module
        case "tesseract":
            from groundkern.trainer.prepare.ocr import tesseract as module
        case "paddle":
            from groundkern.trainer.prepare.ocr import paddle as module
        case other:
            raise ConfigError(f"`engine`: expected {' or '.join(ENGINES)}, got {other!r}")
    return module
