"""Target maps against counted pixels, and shapes that end on the edges of tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern import maps
from groundkern.maps import patch_grid

FRACTION = st.floats(0, 1, allow_nan=False, width=32)


def _picture(values, height, width):
    return torch.as_tensor(values).reshape(height, width).tolist()


def test_patch_grid_is_row_major():
    grid = patch_grid(2, 4)
    assert grid.shape == (8, 4)
    assert grid[0].tolist() == [0, 0, 0.25, 0.5]
    assert grid[5].tolist() == [0.25, 0.5, 0.5, 1.0]


def test_overlap_counts_pixels():
    grid = patch_grid(3, 4)  # 12 x 12 pixels: tokens of 3 x 4
    box = (2, 1, 8, 9)
    share = maps.overlap(grid, [[v / 12 for v in box]])
    for token, (x0, y0, x1, y1) in enumerate((grid * 12).round().int().tolist()):
        inside = sum(
            box[0] <= x < box[2] and box[1] <= y < box[3]
            for x in range(x0, x1)
            for y in range(y0, y1)
        )
        assert share[0, token].item() == pytest.approx(inside / 12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(FRACTION, min_size=3, max_size=9), FRACTION, FRACTION)
def test_polygon_areas_add_up_to_the_shoelace_area(radii, cx, cy):
    corners = []
    for k, radius in enumerate(radii):  # star-shaped, so concave but simple
        r, phi = 0.05 + 0.4 * radius, 2 * math.pi * k / len(radii)
        corners.append((cx + r * math.cos(phi), cy + r * math.sin(phi)))
    grid = patch_grid(7, 5) * 4 - 1.5  # covers the polygon wherever it lies
    pairs = zip(corners, corners[1:] + corners[:1])
    area = abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs)) / 2
    token = (grid[0, 2] - grid[0, 0]) * (grid[0, 3] - grid[0, 1])
    share = maps.polygon_overlap(grid, corners)
    assert (share.sum() * token).item() == pytest.approx(area, abs=1e-6)
    torch.testing.assert_close(maps.polygon_overlap(grid, corners[::-1]), share)


def test_polygon_of_a_box_and_of_an_l():
    grid = patch_grid(4, 4)
    x0, y0, x1, y1 = box = (0.1, 0.2, 0.9, 0.65)
    as_polygon = maps.polygon_overlap(grid, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    torch.testing.assert_close(as_polygon, maps.overlap(grid, [box])[0])
    l_shape = [(0, 0), (0.25, 0), (0.25, 0.75), (1, 0.75), (1, 1), (0, 1)]
    assert _picture(maps.polygon_overlap(grid, l_shape), 4, 4) == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]


def test_polygon_triangle_by_sampling():
    grid = patch_grid(3, 5)
    (ax, ay), (bx, by), (cx, cy) = triangle = [(0.1, 0.05), (0.95, 0.4), (0.3, 0.9)]
    axis = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def left_of(px, py, qx, qy):
        return (qx - px) * (y - py) - (qy - py) * (x - px) > 0

    hit = left_of(ax, ay, bx, by) & left_of(bx, by, cx, cy) & left_of(cx, cy, ax, ay)
    sampled = hit.double().reshape(3, 500, 5, 300).mean((1, 3)).reshape(-1)
    torch.testing.assert_close(maps.polygon_overlap(grid, triangle), sampled, rtol=0, atol=2e-3)


def test_polyline_lengths_by_hand():
    grid = patch_grid(2, 4)  # tokens 0.25 wide, 0.5 high
    across = maps.polyline_length(grid, [(0, 0.25), (1, 0.25)])
    assert across.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    down = maps.polyline_length(grid, [(0.125, 0.75), (0.125, 0)])
    assert down.tolist() == [1, 0, 0, 0, 0.5, 0, 0, 0]
    diagonal = maps.polyline_length(grid, [(0, 0), (0.25, 0.5)])
    assert diagonal.tolist() == pytest.approx([math.sqrt(2)] + [0] * 7)
    bent = maps.polyline_length(grid, [(0.125, 0.25), (0.375, 0.25), (0.375, 0.75)])
    assert bent.tolist() == [0.5, 1, 0, 0, 0, 0.5, 0, 0]
    edge = maps.polyline_length(grid, [(0.3, 0.5), (0.45, 0.5)])
    assert edge.tolist() == pytest.approx([0, 0.6, 0, 0, 0, 0.6, 0, 0])
    nowhere = torch.full((1, 4), -1.0, dtype=torch.float64)
    assert maps.polyline_length(nowhere, [(-1, -1), (1, 1)]).tolist() == [0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(FRACTION, FRACTION), min_size=2, max_size=6))
def test_polyline_lengths_add_up_and_agree_with_sampling(vertices):
    grid = patch_grid(3, 5)
    inside = maps.polyline_length(grid, vertices)
    line = torch.tensor(vertices, dtype=torch.float64)
    t = (torch.arange(2000, dtype=torch.float64) + 0.5)[:, None] / 2000
    sampled = torch.zeros(15, dtype=torch.float64)
    for a, b in pairwise(line):
        length = ((b - a) * torch.tensor([5.0, 3.0])).norm()
        sampled += maps.contains(grid, a + t * (b - a)).double().mean(0) * length
    on_edge = (line * torch.tensor([5.0, 3.0])) % 1 == 0
    if not on_edge.any():  # a segment along an edge counts for both sides, a sample for one
        torch.testing.assert_close(inside, sampled, rtol=0, atol=0.02)
    else:
        assert (inside >= sampled - 0.02).all()


def test_a_polyline_marks_the_tokens_it_runs_through():
    grid = patch_grid(3, 3)
    line = [(0.1, 0.1), (0.5, 0.1), (0.5, 0.9)]
    found = maps.inside(grid, polylines=[line])
    assert _picture(found.int(), 3, 3) == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    tiny = [(0.5, 0.5), (0.5001, 0.5001)]
    assert maps.inside(grid, polylines=[tiny]).nonzero()[:, 0].tolist() == [4]
    share = maps.target_map(grid, kind="overlap", polylines=[[(0, 0.5), (0.5, 0.5)]])
    assert share.tolist() == pytest.approx([0, 0, 0, 2 / 3, 1 / 3, 0, 0, 0, 0])
    bell = maps.target_map(grid, kind="gaussian", polylines=[[(0, 0.5), (1, 0.5)]]).reshape(3, 3)
    torch.testing.assert_close(bell[1], bell[1, :1].expand(3))
    # one token away from the line is two standard deviations, as for a point
    assert (bell[0, 1] / bell[1, 1]).item() == pytest.approx(math.exp(-2))
    point = maps.target_map(grid, kind="gaussian", points=[(0.2, 0.7)])
    short = maps.target_map(grid, kind="gaussian", polylines=[[(0.2, 0.7), (0.2, 0.7 + 1e-9)]])
    torch.testing.assert_close(short, point)


def test_points_on_edges_belong_to_one_token():
    grid = patch_grid(2, 2)
    points = [(0.2, 0.2), (0.5, 0.2), (0.5, 0.5), (1.0, 1.0), (0.2, 1.0), (1.2, 0.5)]
    hits = maps.contains(grid, points)
    assert [row.nonzero()[:, 0].tolist() for row in hits] == [[0], [1], [3], [3], [2], []]


def test_inside_ignores_a_grazing_edge_and_finds_a_tiny_shape():
    grid = patch_grid(7, 7)
    third = 1 / 7
    rounded = (third - 1e-4, third, 2 * third + 1e-4, 2 * third)
    assert maps.inside(grid, boxes=[rounded]).nonzero()[:, 0].tolist() == [8]
    clear = (third - 0.1 * third, third, 2 * third, 2 * third)
    assert maps.inside(grid, boxes=[clear]).nonzero()[:, 0].tolist() == [7, 8]
    tiny = (0.5, 0.5, 0.5001, 0.5001)
    assert maps.inside(grid, boxes=[tiny]).nonzero()[:, 0].tolist() == [24]
    assert not maps.inside(grid, boxes=[(1.1, 0, 1.2, 1)]).any()
    assert not maps.inside(grid).any()


def test_inside_is_the_union_of_all_shapes():
    grid = patch_grid(3, 3)
    found = maps.inside(
        grid,
        boxes=[(0, 0, 0.3, 0.3)],
        points=[(0.5, 0.5)],
        polygons=[[(0.7, 0.7), (1, 0.7), (1, 1)]],
    )
    assert _picture(found.int(), 3, 3) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_neighbours_are_the_eight_around():
    target = maps.target_map(patch_grid(5, 5), points=[(0.5, 0.5)])
    assert target.dtype == torch.float32
    assert target.sum().item() == pytest.approx(1.0)
    share = (target / target.max()).reshape(5, 5)
    assert share[2, 2].item() == 1.0
    ring = [(r, c) for r in (1, 2, 3) for c in (1, 2, 3) if (r, c) != (2, 2)]
    for r in range(5):
        for c in range(5):
            if (r, c) != (2, 2):
                wanted = 0.5 if (r, c) in ring else 1e-3
                assert share[r, c].item() == pytest.approx(wanted)


def test_neighbours_at_a_corner_do_not_wrap():
    target = maps.target_map(patch_grid(3, 3), boxes=[(0, 0, 0.3, 0.3)], levels=(4.0, 2.0, 0.0))
    assert _picture(target * 10, 3, 3) == [
        pytest.approx([4, 2, 0]),
        pytest.approx([2, 2, 0]),
        [0, 0, 0],
    ]


def test_kinds():
    grid = patch_grid(1, 4)
    box = {"boxes": [(0.25, 0, 0.625, 1)]}  # all of token 1, half of token 2
    uniform = maps.target_map(grid, kind="uniform", **box)
    assert (uniform / uniform.max()).tolist() == pytest.approx([1e-3, 1, 1, 1e-3])
    share = maps.target_map(grid, kind="overlap", **box)
    assert share.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])
    bell = maps.target_map(patch_grid(9, 9), kind="gaussian", points=[(0.5, 0.5)]).reshape(9, 9)
    assert bell.argmax().item() == 40
    torch.testing.assert_close(bell, bell.T)
    torch.testing.assert_close(bell, bell.flip(0))
    # one token away from a point is two standard deviations
    assert (bell[4, 5] / bell[4, 4]).item() == pytest.approx(math.exp(-2))
    wide = maps.target_map(patch_grid(9, 9), kind="gaussian", boxes=[(0, 4 / 9, 1, 5 / 9)])
    wide = wide.reshape(9, 9)
    assert wide[4, 0] > wide[0, 4]
    with pytest.raises(ValueError, match="`kind`: expected 'neighbours'"):
        maps.target_map(grid, kind="box", **box)


@pytest.mark.parametrize("kind", ["neighbours", "uniform", "overlap", "gaussian"])
def test_an_empty_target_is_all_zero(kind):
    grid = patch_grid(3, 3)
    assert not maps.target_map(grid, kind=kind).any()
    assert not maps.target_map(grid, kind=kind, boxes=[(1.5, 0, 1.7, 1)]).any()
    assert maps.target_map(grid[:0], kind=kind, points=[(0.5, 0.5)]).shape == (0,)


@pytest.mark.parametrize("kind", ["neighbours", "uniform", "overlap", "gaussian"])
def test_a_token_without_a_place_gets_nothing(kind):
    nowhere = torch.full((1, 4), -1.0, dtype=torch.float64)
    grid = torch.cat([nowhere, patch_grid(3, 3)])
    target = maps.target_map(grid, kind=kind, boxes=[(0, 0, 1, 1)], points=[(0, 0)])
    assert target[0].item() == 0.0
    assert target[1:].sum().item() == pytest.approx(1.0)


def test_a_map_of_tiles_and_a_global_view_marks_both():
    views = torch.cat([patch_grid(2, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).double()])
    found = maps.inside(views, boxes=[(0.6, 0.6, 0.9, 0.9)])
    assert found.tolist() == [False, False, False, True, True]


def test_quantised_maps_come_back():
    target = torch.stack(
        [
            maps.target_map(patch_grid(16, 16), boxes=[(0.1, 0.2, 0.5, 0.4)]),
            maps.target_map(patch_grid(16, 16), kind="gaussian", points=[(0.3, 0.3)]),
            torch.zeros(256),
        ]
    )
    integers = maps.quantise(target)
    assert integers.dtype == torch.int32
    assert integers.amax(-1).tolist() == [maps.FIXED_POINT_ONE, maps.FIXED_POINT_ONE, 0]
    torch.testing.assert_close(maps.dequantise(integers), target, rtol=0, atol=1e-6)
    padded = torch.cat([integers, torch.full((3, 2), -1, dtype=torch.int32)], 1)
    torch.testing.assert_close(maps.dequantise(padded)[:, :256], maps.dequantise(integers))
    assert maps.quantise(target[:, :0]).shape == (3, 0)
    assert maps.dequantise(integers[:, :0]).shape == (3, 0)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"`boxes`: expected shape \[\*, 4\], got \[1, 3\]"):
        maps.overlap(patch_grid(2, 2), [(0, 0, 1)])
    with pytest.raises(ValueError, match="`levels`"):
        maps.target_map(patch_grid(2, 2), levels=(0.0, 0.5, 0.1))


@pytest.mark.parametrize("point", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)])
def test_a_point_on_the_last_edge_and_a_shared_one_lies_in_one_rectangle(point):
    held = maps.contains(maps.patch_grid(2, 2), [point])[0]
    x, y = (min(1, int(value * 2)) for value in point)  # the right or lower, or the last
    assert held.nonzero()[:, 0].tolist() == [y * 2 + x]


def test_a_polygon_with_an_edge_that_is_almost_upright_has_its_area():
    triangle = [[0.0, 0.0], [1.0, 0.0], [1e-320, 1.0]]
    covered = maps.polygon_overlap(maps.patch_grid(2, 2), triangle)
    assert float(covered.sum()) / 4 == pytest.approx(0.5)


def test_an_unknown_kind_is_refused_without_shapes_on_tokens() -> None:
    for shapes in ({}, {"bells": [(0.5, 0.5, 0.1, 0.1)]}, {"boxes": [(2.0, 2.0, 3.0, 3.0)]}):
        with pytest.raises(ValueError, match="`kind`: expected 'neighbours', "):
            maps.target_map(patch_grid(2, 2), kind="circle", **shapes)
