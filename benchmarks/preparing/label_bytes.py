"""Bytes of the labels of a sample as JSON lines: `python -m benchmarks.preparing.label_bytes`."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from groundkern.trainer.data.run_lengths import encoded

WORDS = Path(__file__).parents[1] / "labels" / "words.txt"
PAGE, PHOTO = (1654, 2339), (640, 480)  # pixels
SAMPLES = 10**9


def table() -> list[str]:
    """Markdown: bytes of a sample's labels as JSON, and what 10^9 samples take."""
    lines = ["| labels of a sample | bytes | deflated | TB for 10^9 |", "|---|---|---|---|"]
    for title, (plain, deflated) in label_bytes().items():
        row = f"{plain:,.0f} | {deflated:,.0f} | {plain * SAMPLES / 1e12:,.1f}"
        lines.append(f"| {title} | {row} |")
    return lines


def label_bytes(samples: int = 50) -> dict[str, tuple[float, float]]:
    """Bytes of labels as JSON, by kind: as they are, and deflated with those of other samples.

    Args:
        samples: to take the mean of.
    """
    draw = random.Random(0)
    texts = WORDS.read_text(encoding="utf-8").splitlines()[0].split()[1:]  # the English ones

    def box(size: tuple[int, int], width: int, height: int) -> list[int]:
        x, y = draw.randrange(size[0] - width), draw.randrange(size[1] - height)
        return [x, y, x + width, y + height]

    def words() -> dict[str, Any]:
        chosen = [draw.choice(texts) for _ in range(200)]
        return {"words": [{"text": x, "box": box(PAGE, 14 * len(x), 28)} for x in chosen]}

    def regions() -> dict[str, Any]:
        chosen = [" ".join(draw.choices(texts, k=2)) for _ in range(8)]
        return {"regions": [{"text": x, "box": box(PHOTO, 120, 90)} for x in chosen]}

    def masks() -> dict[str, Any]:
        chosen = [" ".join(draw.choices(texts, k=2)) for _ in range(2)]
        return {"regions": [{"text": x, "mask": _ellipse(draw)} for x in chosen]}

    kinds = {
        "200 words of a page": words,
        "8 regions with boxes": regions,
        "2 regions with masks of run lengths": masks,
    }
    found = {}
    for title, make in kinds.items():
        lines = "".join(json.dumps(make()) + "\n" for _ in range(samples)).encode()
        found[title] = len(lines) / samples, len(zlib.compress(lines)) / samples
    return found


def _ellipse(draw: random.Random) -> dict[str, Any]:
    """The run lengths of one, somewhere in a photo."""
    width, height = PHOTO
    y, x = np.mgrid[:height, :width]
    a, b = draw.randrange(30, 120), draw.randrange(30, 120)
    inside = ((x - draw.randrange(width)) / a) ** 2 + ((y - draw.randrange(height)) / b) ** 2 < 1
    return encoded(inside)


if __name__ == "__main__":
    print("\n".join(table()))
