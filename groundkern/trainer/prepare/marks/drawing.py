"""Numbered, see-through masks over the text regions of an image, for a model to name."""

from __future__ import annotations

import base64
import colorsys
import io

from PIL import Image, ImageDraw, ImageFont

from groundkern.trainer.prepare.marks.grouping import Box

ALPHA = 0.35


def draw_marks(
    image: Image.Image, marks: dict[str, Box], *, alpha: float = ALPHA, max_side: int = 1536
) -> Image.Image:
    """The image with a mask over each box and its number beside it.

    Args:
        image: 8-bit RGB.
        marks: boxes in pixels of `image`, by number.
        alpha: opacity of the masks, 0 to 1; the text below stays readable.
        max_side: the longer side is made no longer than this, in pixels.
    """
    scale = min(1.0, max_side / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    masks = Image.new("RGBA", size)
    draw = ImageDraw.Draw(masks)
    placed = []
    for n, (number, box) in enumerate(marks.items()):
        x0, y0, x1, y1 = (round(edge * scale) for edge in box)
        color = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(n * 0.618 % 1, 0.9, 0.85))
        draw.rectangle((x0, y0, x1, y1), (*color, round(255 * alpha)), (*color, 255))
        placed.append((number, (x0, y0, x1, y1), color))
    font = ImageFont.load_default(max(10, round(max(size) / 90)))
    for number, box, color in placed:  # after the masks, so that no mask hides a number
        _draw_number(draw, number, box, color, font, size)
    return Image.alpha_composite(picture, masks).convert("RGB")


def data_url(image: Image.Image) -> str:
    """The image as JPEG in a `data:` URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw_number(draw, number: str, box: tuple, color: tuple, font, size: tuple) -> None:
    """Left of the box if there is room, else right of it, else on its left edge."""
    _, _, width, height = draw.textbbox((0, 0), number, font=font)
    x = box[0] - width - 3
    if x < 0:
        x = box[2] + 3 if box[2] + 3 + width <= size[0] else box[0]
    y = min(max(0, (box[1] + box[3] - height) // 2), size[1] - height)
    draw.rectangle((x - 1, y, x + width, y + height), (255, 255, 255, 255))
    draw.text((x, y), number, (*color, 255), font=font)
