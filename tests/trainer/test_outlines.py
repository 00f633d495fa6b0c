"""Masks and heats in pictures: their edges, and what `inspect` lays over an image."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from groundkern.rasters import Raster
from groundkern.trainer.inspection.overlays import COVER, HEAT, overlay
from groundkern.trainer.outlines import FINE, outlines
from groundkern.trainer.pictures import outline
from groundkern.trainer.program import main


def mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Raster:
    """A mask of boxes in pixels; the second is cut out of the first, and so on."""
    values = torch.zeros(height, width, dtype=torch.bool)
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        values[y0:y1, x0:x1] = n % 2 == 0
    return Raster(values)


def area(line: list) -> float:
    """Of a closed line."""
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(line))) / 2


@pytest.mark.parametrize("box", [(10, 20, 30, 60), (0, 0, 50, 80), (49, 79, 50, 80)])
def test_the_outline_of_a_box_is_its_edge(box):
    (line,) = outlines(mask(80, 50, box))
    assert line[0] == line[-1]
    x, y = zip(*line)
    x0, y0, x1, y1 = box[0] / 50, box[1] / 80, box[2] / 50, box[3] / 80
    assert (min(x), min(y), max(x), max(y)) == pytest.approx((x0, y0, x1, y1), abs=1e-4)
    corners = 4 * (0.5 * 0.5 / 2) / (50 * 80)  # of half a pixel, cut
    assert area(line) == pytest.approx((x1 - x0) * (y1 - y0) - corners, abs=1e-4)


def test_holes_and_parts_have_outlines_of_their_own():
    assert len(outlines(mask(40, 40, (5, 5, 35, 35), (10, 10, 20, 20)))) == 2
    assert len(outlines(mask(40, 40, (0, 0, 9, 9), (0, 0, 0, 0), (20, 20, 40, 40)))) == 2


def test_a_thin_line_of_a_large_mask_is_outlined():
    (line,) = outlines(mask(30, 8 * FINE, (0, 14, 8 * FINE, 15)))
    x, y = zip(*line)
    assert (min(x), max(x)) == (0, 1)
    assert all(abs(value - 14.5 / 30) <= 0.6 / 30 for value in y)


def test_a_heat_is_outlined_where_it_is_half_as_hot():
    axis = (torch.arange(300) + 0.5) / 300 - 0.5
    bell = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.1**2))
    (line,) = outlines(Raster(bell * 7))
    radii = [math.hypot(x - 0.5, y - 0.5) for x, y in line]
    half = math.sqrt(2 * math.log(2)) * 0.1
    assert (min(radii), max(radii)) == pytest.approx((half, half), abs=2e-3)


def test_outlines_are_drawn_like_other_lines():
    picture = Image.new("RGB", (100, 100), "white")
    lines = outlines(mask(50, 50, (10, 10, 40, 40)))
    outline(picture, {"boxes": [], "points": [], "polygons": [], "polylines": lines})
    blue = np.asarray(picture)[..., 0] < 100
    assert blue[50, 18:23].any()
    assert blue[18:23, 50].any()
    assert not blue[30:70, 30:70].any()


def opened(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_an_overlay_covers_what_is_inside_and_draws_its_edge():
    shape = mask(600, 900, (100, 100, 700, 500), (100, 100, 400, 300))  # an L, of 600 x 400
    pixels = opened(overlay(shape, "#1c7ed6"))
    assert pixels.shape == (400, 600, 4)
    assert pixels[0, 0, :3].tolist() == [0x1C, 0x7E, 0xD6]
    alpha = pixels[..., 3]
    assert set(alpha[20:180, 20:280].reshape(-1).tolist()) == {0}
    assert set(alpha[220:380, 320:580].reshape(-1).tolist()) == {round(COVER * 255)}
    assert (alpha[195:205, 150] == 255).any()
    assert opened(overlay(mask(900, 900, (7, 7, 10, 10)), "#1c7ed6")).shape == (240, 240, 4)


def test_a_heat_covers_by_its_value():
    ramp = torch.linspace(0, 1, 101).expand(50, 101)
    alpha = opened(overlay(Raster(ramp * 9), "#1c7ed6"))[..., 3].astype(int)
    row = alpha[10][alpha[10] < 255]
    assert (np.diff(row) >= 0).all()
    assert row[-1] == round(HEAT * 255)
    assert (alpha[10] == 255).sum() in (1, 2, 3, 4, 5, 6)  # the line at half


def test_the_page_lays_masks_and_heats_over_the_image(tmp_path):
    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.png")
    Image.fromarray(np.uint8(mask(20, 40, (10, 5, 30, 15)).values)).save(tmp_path / "mask.png")
    np.save(tmp_path / "heat.npy", np.ones((20, 40)))
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}]
    record = {"images": ["a.png"], "messages": chat}
    record["regions"] = [{"text": "cat", "mask": "mask.png"}, {"text": "a", "heat": "heat.npy"}]
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["inspect", str(tmp_path / "data.jsonl")]) == 0
    page = (tmp_path / "data.inspect.html").read_text()
    sides = " ".join(f'{name}="([^"]+)"' for name in ("x", "y", "width", "height"))
    found = re.findall(f'<image href="data:image/png;base64,[^"]+" {sides} preserve', page)
    shares = [[float(value) / 40 for value in each] for each in found]
    times = shares[1][2]  # by which the small image is enlarged
    assert shares == [[v * times for v in (0.25, 0.125, 0.5, 0.25)], [0, 0, times, times / 2]]
