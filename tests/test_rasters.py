"""Masks and heats against counted pixels, boxes and polygons."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern import maps
from groundkern.maps import patch_grid, raster_overlap
from groundkern.rasters import HOT, Raster
from groundkern.targets.areas import covered

KINDS = ("neighbours", "uniform", "overlap", "gaussian")
EXACT = 1e-12
NOWHERE = torch.full((1, 4), -1.0, dtype=torch.float64)
FRACTION = st.floats(-0.5, 1.5, allow_nan=False, width=64)
# a class token, a pyramid of two views, and tokens of a padded square, which leave the image
TILED = torch.cat([NOWHERE, patch_grid(3, 3), NOWHERE, patch_grid(6, 4)])
PADDED = patch_grid(5, 5) * torch.tensor([1.0, 1.6, 1.0, 1.6]) - torch.tensor([0.0, 0.3, 0.0, 0.3])
CROPPED = patch_grid(4, 4) * 0.7 + 0.15
GRIDS = {"plain": patch_grid(7, 5), "tiled": TILED, "padded": PADDED, "cropped": CROPPED,
         "one": patch_grid(1, 1)}  # fmt: skip


def _random(height, width, seed=0, heat=False):
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    return values if heat else values > 0.6


def _box_mask(x0, y0, x1, y1, height=12, width=20, dtype=torch.bool):
    """A mask of a box in pixels, and the box in fractions."""
    values = torch.zeros(height, width, dtype=dtype)
    values[y0:y1, x0:x1] = 1
    return Raster(values), (x0 / width, y0 / height, x1 / width, y1 / height)


def _by_hand(values, rects):
    """Pixel by pixel: the area that each shares with a rectangle."""
    height, width = values.shape
    found = []
    for x0, y0, x1, y1 in rects.double().tolist():
        total = 0.0
        for row in range(height):
            tall = min(y1, (row + 1) / height) - max(y0, row / height)
            for column in range(width):
                wide = min(x1, (column + 1) / width) - max(x0, column / width)
                total += max(0.0, tall) * max(0.0, wide) * float(values[row, column])
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("heat", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (7, 5), (14, 15), (13, 11)])
def test_areas_are_those_of_the_pixels(size, grid, heat):
    values, rects = _random(*size, seed=3, heat=heat), GRIDS[grid].clamp(-0.3, 1.3)
    values[-1, -1] = 1
    share = raster_overlap(rects, Raster(values))
    area = (rects[:, 2:] - rects[:, :2]).prod(-1)
    wanted = _by_hand(values, rects) / values.max().double() / area.clamp_min(1e-9)
    assert torch.equal(share > 0, wanted > 0)
    torch.testing.assert_close(share, wanted, rtol=EXACT, atol=EXACT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(FRACTION, FRACTION, FRACTION, FRACTION), min_size=1, max_size=5),
       st.integers(1, 6), st.integers(1, 6), st.integers(1, 2**36 - 1))  # fmt: skip
def test_any_rectangles_over_any_pixels(corners, height, width, bits):
    values = torch.tensor([bits >> i & 1 for i in range(height * width)], dtype=torch.bool)
    values = values.reshape(height, width)
    rects = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    rects = torch.tensor(rects, dtype=torch.float64)
    found = covered(values, rects)
    torch.testing.assert_close(found, _by_hand(values, rects), rtol=EXACT, atol=EXACT)


def test_a_large_mask_of_a_checkerboard_loses_nothing():
    y, x = torch.meshgrid(torch.arange(1500), torch.arange(1000), indexing="ij")
    share = raster_overlap(patch_grid(75, 50), Raster((y + x) % 2 == 0))  # 20 x 20 pixels each
    assert (share - 0.5).abs().max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("box", [(3, 2, 9, 11), (0, 0, 20, 12), (7, 5, 8, 6), (0, 11, 20, 12)])
def test_the_mask_of_a_box_is_the_box(box, grid, kind):
    rects = GRIDS[grid]
    mask, fractions = _box_mask(*box)
    share = maps.overlap(rects, [fractions])[0]
    torch.testing.assert_close(raster_overlap(rects, mask), share, rtol=EXACT, atol=EXACT)
    assert torch.equal(maps.inside(rects, rasters=[mask]), maps.inside(rects, boxes=[fractions]))
    made = maps.target_map(rects, kind=kind, rasters=[mask])
    wanted = maps.target_map(rects, kind=kind, boxes=[fractions])
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-9)
    x0, y0, x1, y1 = fractions
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    same = maps.target_map(rects, kind=kind, polygons=[corners])
    torch.testing.assert_close(made, same, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("unit", [1e-30, 0.3, 255.0, 65535.0])
def test_a_heat_that_is_even_on_a_box_is_what_the_box_covers(unit, grid):
    rects = GRIDS[grid]
    mask, box = _box_mask(3, 2, 9, 11)
    heat = Raster(mask.values * torch.tensor(unit))
    share = maps.overlap(rects, [box])[0]
    torch.testing.assert_close(raster_overlap(rects, heat), share, rtol=EXACT, atol=EXACT)
    assert torch.equal(maps.inside(rects, rasters=[heat]), maps.inside(rects, boxes=[box]))
    for kind in KINDS:  # of whatever kind, the heat is the target
        made = maps.target_map(rects, kind=kind, rasters=[heat])
        wanted = (share / share.sum().clamp_min(1e-300)).float()
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-9)


def test_a_heat_is_its_mean_over_each_token():
    values = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 8.0]])
    heat = Raster(values)
    grid = patch_grid(1, 2)
    assert raster_overlap(grid, heat).tolist() == [2 / 8, 2 / 8]
    assert maps.target_map(grid, rasters=[heat]).tolist() == [0.5, 0.5]
    assert maps.target_map(patch_grid(2, 4), rasters=[heat]).tolist() == (
        (values / 16).reshape(-1).tolist()
    )
    half = values >= HOT * 8
    assert torch.equal(heat.mask().values, half)
    assert maps.inside(grid, rasters=[heat]).tolist() == [False, True]
    assert heat.bounds() == (0, 0, 1, 1)
    assert heat.mask().bounds() == (0.75, 0.5, 1, 1)


def test_the_hot_half_of_a_bell_is_its_full_width_at_half_maximum():
    axis = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 - 0.5
    bell = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.1**2))
    x0, y0, x1, y1 = Raster(bell).mask().bounds()
    wide = 2 * math.sqrt(2 * math.log(2)) * 0.1
    assert (x1 - x0, y1 - y0) == pytest.approx((wide, wide), abs=1 / 200)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_unite_with_other_shapes_as_those_do(kind):
    grid = patch_grid(4, 6)
    mask, box = _box_mask(0, 0, 7, 5)
    other, second = _box_mask(13, 8, 20, 12)
    both = maps.target_map(grid, kind=kind, rasters=[mask, other])
    wanted = maps.target_map(grid, kind=kind, boxes=[box, second])
    torch.testing.assert_close(both, wanted, rtol=1e-6, atol=1e-9)
    mixed = maps.target_map(grid, kind=kind, rasters=[mask], boxes=[second])
    torch.testing.assert_close(mixed, wanted, rtol=1e-6, atol=1e-9)
    union = maps.inside(grid, boxes=[box, second])
    assert torch.equal(maps.inside(grid, boxes=[box], rasters=[other]), union)


def test_a_heat_beside_a_box_counts_up_to_as_much_as_the_box():
    grid = patch_grid(1, 4)
    heat = Raster(torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
    both = {"boxes": [(0, 0, 0.25, 1)], "rasters": [heat]}
    found = maps.target_map(grid, kind="uniform", levels=(3.0, 1.0, 0.0), **both)
    assert found.tolist() == pytest.approx([0.4, 0, 0.2, 0.4])
    assert maps.target_map(grid, kind="overlap", **both).tolist() == pytest.approx(found.tolist())


def test_a_mask_too_small_for_a_hundredth_covers_where_it_lies():
    values = torch.zeros(500, 500, dtype=torch.bool)
    values[251, 251] = True
    assert maps.inside(patch_grid(2, 2), rasters=[Raster(values)]).tolist() == [False] * 3 + [True]
    nothing = maps.target_map(patch_grid(2, 2) * 0.2, rasters=[Raster(values)])
    assert nothing.tolist() == [0] * 4  # beyond what the tokens see
    assert maps.target_map(patch_grid(2, 2)[:0], rasters=[Raster(values)]).shape == (0,)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[True]], TypeError, "`raster`: expected a tensor [height, width], got list"),
        (torch.ones(2, 2).int(), TypeError, "`raster`: expected bool (a mask) or floating"),
        (torch.ones(3), ValueError, "`raster`: expected [height, width], 1 x 1 at least, got [3]"),
        (torch.ones(3, 0), ValueError, "1 x 1 at least, got [3, 0]"),
        (torch.zeros(2, 2).bool(), ValueError, "`mask`: expected a pixel inside, got none"),
        (torch.zeros(2, 2), ValueError, "`heat`: expected a number above 0, got zeros"),
        (torch.tensor([[1.0, -1.0]]), ValueError, "finite numbers >= 0, got -1.0 to 1.0"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "`heat`: expected finite numbers >= 0"),
        (torch.tensor([[1.0, math.inf]]), ValueError, "`heat`: expected finite numbers >= 0"),
    ],
)
def test_what_is_no_raster_is_refused(values, error, message):
    with pytest.raises(error) as caught:
        Raster(values)
    assert message in str(caught.value)
