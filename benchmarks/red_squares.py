"""A sample for tiny runs: a red square on a grid, and the answer that says where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CELL = 28  # pixels, one visual token of Qwen2.5-VL


def red_square(folder: Path, number: int, cells: int, *, ending: str = "") -> dict[str, Any]:
    """Write an image and return its sample, as docs/data/data-format.md has it.

    Args:
        folder: that the image is written into.
        number: of the sample; the square goes through the grid row by row, again and again.
        cells: the rows and columns of the grid.
        ending: of the answer.
    """
    row, column = divmod(number % cells**2, cells)
    box = [CELL * column, CELL * row, CELL * (column + 1), CELL * (row + 1)]
    image = Image.new("RGB", (CELL * cells, CELL * cells), "white")
    ImageDraw.Draw(image).rectangle(box, fill="red")
    image.save(folder / f"{number}.png")
    asked = [{"type": "image"}, {"type": "text", "text": "Where is the red patch?"}]
    answer = f"row {row} column {column}{ending}"
    return {
        "images": [f"{number}.png"],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ],
        "regions": [{"text": answer, "box": box}],
    }
