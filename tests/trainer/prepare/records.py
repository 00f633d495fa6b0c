"""Records that tests write and read."""

from __future__ import annotations

import json
from pathlib import Path

from groundkern.trainer.prepare.ocr.cache import Readings
from groundkern.trainer.prepare.ocr.settings import OcrSettings


def sample(answer: str = "yes", image: str | None = "a.png", **more) -> dict:
    """A canonical sample."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return {"images": [image] if image else [], "messages": messages, **more}


def lines_of(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def readings(folder: Path) -> Readings:
    """Readings of images as they are stored, kept in the folder."""
    settings = OcrSettings(scale=1.0, rotation=False)
    return Readings(folder / "out.jsonl.readings", settings, "a test's engine")
