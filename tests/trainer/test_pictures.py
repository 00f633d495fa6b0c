"""Heat maps and loss curves: where colour lies, what stays readable under it, and their size."""

from __future__ import annotations

import base64
import io
import re
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from groundkern.trainer.drawing.scenes import font
from groundkern.trainer.heatmaps import kept
from groundkern.trainer.pictures import (
    close_up,
    full_scale,
    heat_picture,
    heated,
    loss_curves,
    page_uri,
)


def data_uri(size=(60, 40)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (250, 250, 250)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pixels(uri: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(picture.convert("RGB")).astype(int)


def entry(**values) -> dict:
    rects = [[x / 3, y / 2, (x + 1) / 3, (y + 1) / 2] for y in range(2) for x in range(3)]
    found = {
        "task": "pointing",
        "name": "test.jsonl:1",
        "question": "Where <is> it?",
        "answer": "row 1",
        "image": data_uri(),
        "size": [60, 40],
        "boxes": [[0.0, 0.0, 1 / 3, 0.5]],
        "points": [],
        "polygons": [],
        "polylines": [],
        "rects": rects,
        "attention": [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
        "contribution": [0.5, -0.1, 0.1, 0.0, 0.0, 0.0],
    }
    return {**found, **values}


def test_heat_lies_where_the_value_is():
    values = [0.0] * 5 + [1.0]
    cold = pixels(heat_picture(entry(boxes=[]), [0.0] * 6))
    hot = pixels(heat_picture(entry(boxes=[]), values))
    changed = (hot != cold).any(-1)
    height, width = changed.shape
    assert changed[height // 2 + 2 :, 2 * width // 3 + 2 :].all()
    assert not changed[: height // 2 - 2].any()
    assert not changed[:, : 2 * width // 3 - 2].any()


def test_no_attention_leaves_every_pixel_as_light_as_it_was():
    rng = np.random.default_rng(0)
    for shape in ((40, 60), (40, 60, 3)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert("RGB")
        rects = entry()["rects"]
        under = heated(image, rects, np.zeros(6), 1.0)
        assert np.array_equal(np.asarray(under), np.asarray(image.convert("L").convert("RGB")))
    grey = entry(boxes=[])  # through the page's own pictures: a grey image is itself
    assert heat_picture(grey, [0.0] * 6) == heat_picture(grey, None)
    some = heated(image, rects, np.array([0.0] * 5 + [0.5]), 1.0)
    changed = (np.asarray(some) != np.asarray(image.convert("L").convert("RGB"))).any(-1)
    assert changed[20:, 40:].mean() > 0.99
    assert not changed[:20].any()


def luminance(colour: np.ndarray) -> float:
    """WCAG's relative luminance of an sRGB colour."""
    part = colour / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


INKS = [(40, 252), (0, 255), (255, 20), (235, 30)]


@pytest.mark.parametrize(("ink", "paper"), INKS, ids=lambda x: str(x))
@pytest.mark.parametrize("sign", [1, -1], ids=["raises", "lowers"])
def test_text_under_any_heat_keeps_the_contrast_that_wcag_asks_of_text(ink, paper, sign):
    image = Image.fromarray(np.array([[ink, paper]], dtype=np.uint8)).convert("RGB")
    for heat in np.linspace(0, 1, 41):
        both = np.asarray(heated(image, [(0, 0, 1, 1)], np.array([sign * heat]), 1.0), dtype=float)
        low, high = sorted(luminance(colour) for colour in both[0])
        assert (high + 0.05) / (low + 0.05) >= 4.5, heat


def receipt(size=(600, 1800), line=24) -> Image.Image:
    """Lines of a name and a price, as dense as a till prints them."""
    image, (width, height) = Image.new("RGB", size, (252, 251, 247)), size
    draw, face = ImageDraw.Draw(image), font(17)
    for number, y in enumerate(range(10, height - line, line)):
        draw.text((20, y), f"{number % 9 + 1} x TOMATO SAUCE", fill=(40, 40, 40), font=face)
        draw.text(
            (width - 80, y), f"{number % 30}.{number % 90 + 10}", fill=(40, 40, 40), font=face
        )
    return image


@cache
def receipt_uri(size: tuple[int, int]) -> str:
    return page_uri(kept(receipt(size)), quality=92)


def receipt_entry(box=(500, 1018, 598, 1040), size=(600, 1800), **values) -> dict:
    width, height = size
    columns, lines = width // 28, height // 28
    rects = [
        [x / columns, y / lines, (x + 1) / columns, (y + 1) / lines]
        for y in range(lines)
        for x in range(columns)
    ]
    fractions = [edge / size[i % 2] for i, edge in enumerate(box)]
    return entry(image=receipt_uri(size), boxes=[fractions], rects=rects, **values)


def test_a_receipt_is_large_enough_to_read_and_its_target_is_shown_at_full_size():
    shown = receipt_entry()
    heat = [0.0] * len(shown["rects"])
    height, width, _ = pixels(heat_picture(shown, heat)).shape
    assert abs(width * height - 300_000) < 2_000
    assert height / width == pytest.approx(3, rel=0.01)
    close = pixels(close_up(shown, heat))
    assert close.shape == (270, 360, 3)
    # one pixel of the receipt to one of the close-up: the target's text is as it was drawn
    drawn = np.asarray(receipt().convert("L"), dtype=int)
    target = drawn[1018:1040, 500:598]
    scale = np.sqrt(1_200_000 / (600 * 1800))
    assert scale > 1  # so the receipt was kept as it is
    y0, x0 = round(1029 - 270 / 2), 240  # centred; at the right edge
    there = close[1018 - y0 : 1040 - y0, 500 - x0 : 598 - x0].mean(-1)
    assert np.abs(there - target).mean() < 4  # kept as WebP
    assert there.std() > 40


def test_the_outline_surrounds_its_text_and_covers_none_of_it():
    shown = receipt_entry()
    close, plain = (
        pixels(close_up({**shown, "boxes": boxes, "points": points}, None))
        for boxes, points in ((shown["boxes"], []), ([], [[549 / 600, 1029 / 1800]]))
    )
    y0, x0 = 1029 - 135, 240
    around = close[1018 - y0 - 6 : 1040 - y0 + 6, 500 - x0 - 6 : 598 - x0 + 2]
    blue = (around[..., 2] > 200) & (around[..., 0] < 60)
    assert blue.sum() > 2 * (98 + 22)
    inner = close[1018 - y0 : 1040 - y0, 500 - x0 : 596 - x0]
    assert not ((inner[..., 2] > 200) & (inner[..., 0] < 60)).any()
    assert plain.shape == close.shape


def test_a_close_up_is_of_large_images_with_a_small_target():
    assert close_up(entry(), None) is None  # drawn larger than it is
    assert close_up(receipt_entry(box=(0, 0, 600, 1700)), None) is None  # nearly all of it
    assert close_up({**receipt_entry(), "boxes": []}, None) is None
    corner = pixels(close_up(receipt_entry(box=(0, 0, 40, 20)), None))
    beyond = pixels(close_up(receipt_entry(box=(-300, -10, 40, 20)), None))
    assert corner.shape == beyond.shape == (270, 360, 3)
    wide = pixels(close_up(receipt_entry(box=(10, 500, 590, 520)), None))
    assert wide.shape[1] == 360  # wider than a close-up: made to fit


@pytest.mark.parametrize("size", [(600, 1800), (1500, 4500), (4000, 200), (1, 5000)])
def test_pictures_are_bounded_by_area_whatever_the_shape(size):
    picture = kept(Image.new("RGB", size))
    assert picture.width * picture.height <= max(1.01 * 1_200_000, 1)
    shape = pixels(heat_picture(entry(image=page_uri(picture), boxes=[]), [1.0] * 6)).shape
    assert shape[0] * shape[1] <= 1.01 * 300_000


def test_a_receipt_s_pictures_take_little_room():
    shown = receipt_entry()
    heat = np.random.default_rng(0).gamma(0.3, size=len(shown["rects"]))
    whole, close = (draw(shown, heat, heat.max()) for draw in (heat_picture, close_up))
    assert len(shown["image"]) < 200_000
    assert len(whole) + len(close) < 120_000


def test_one_scale_for_several_maps_keeps_an_even_one_pale():
    even, peaked = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]
    assert full_scale([even, peaked]) == pytest.approx(1.0)  # 4 times the mean
    assert full_scale([[3.0, -9.0, 0.0, 0.0, 0.0]]) == pytest.approx(3.0)
    assert full_scale([]) == full_scale([[]]) == 0.0
    faint, strong = (pixels(heat_picture(entry(boxes=[]), [v] * 6)) for v in (0.1, 1.0))
    assert faint.mean() > strong.mean()


def test_points_polygons_and_boxes_beyond_the_image_are_drawn():
    corners = [[0, 0], [1, 0], [1, 1]]
    shapes = {"points": [[0.5, 0.5]], "polygons": [corners], "polylines": [corners]}
    for kind, value in {**shapes, "boxes": [[-0.5, -0.5, 2.0, 2.0]]}.items():
        given = {"boxes": [], kind: value}
        plain, drawn = (pixels(heat_picture(entry(**g), None)) for g in ({"boxes": []}, given))
        assert (plain != drawn).any(), kind


def test_curves_follow_the_page_s_colour_and_leave_out_runs_without_the_term():
    rows = [{"step": i, "text": 1.0 / (i + 1)} for i in range(4)]
    svg = loss_curves({"one": rows, "two": [{"step": 0, "text": None}]}, "text")
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert svg.count("#e8590c") == 1
    assert "#1c7ed6" not in svg
    assert "http" not in svg.replace("http://www.w3.org/", "")


def test_a_curve_of_one_row_is_a_point_at_a_whole_step():
    svg = loss_curves({"one": [{"step": 4, "text": 1.0}]}, "text")
    used = re.findall(r'<use xlink:href="#(\w+)"[^>]*fill: #e8590c', svg)
    assert len(used) == 1
    assert f'id="{used[0]}"' in svg
    assert re.findall(r">(\d+(?:\.\d+)?)</text>", svg)[0] == "4"
