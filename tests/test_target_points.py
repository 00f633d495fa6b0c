"""Points with a spread, shares of several regions (K8), maps of other tokens (K9), by hand."""

from __future__ import annotations

import math

import pytest
import torch

from groundkern import maps
from groundkern.maps import patch_grid, target_map
from groundkern.rasters import Raster
from groundkern.targets.bells import bell_mass, outlines_of

KINDS = ("neighbours", "uniform", "overlap", "gaussian")


def phi(z: float) -> float:
    """The normal distribution function."""
    return (1 + math.erf(z / math.sqrt(2))) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.9])
def test_a_point_in_the_middle_gives_four_equal_quarters(kind, spread):
    found = target_map(patch_grid(2, 2), kind=kind, bells=[(0.5, 0.5, spread, spread / 2)])
    assert found.tolist() == [0.25] * 4


def test_at_a_tokens_centre_it_is_a_product_of_erfs():
    """On 1 x 4 tokens a quarter wide, x = .375 is the middle of the second: with s = .125 its sides
    are one standard deviation away, those of the others 1, 3 and 5."""
    bell = (0.375, 0.5, 0.125, 1e6)  # in y flat: every token has the same of it
    inside = phi(1) - phi(-1)  # .682689
    left, right, far = phi(-1) - phi(-3), phi(3) - phi(1), phi(5) - phi(3)
    assert inside == pytest.approx(0.6826894921)
    total = left + inside + right + far
    wanted = torch.tensor([[left, inside, right, far]], dtype=torch.float64) / total
    flat = phi(0.5e-6) - phi(-0.5e-6)  # of the image's height, too little of the bell
    assert flat < 1e-6
    assert bell_mass(patch_grid(1, 4), [bell]).tolist() == [[0] * 4]
    found = bell_mass(patch_grid(1, 4), [(*bell[:3], 0.25)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_it_is_integrated_and_not_sampled():
    """Against a fine sum; half of a token's width from its edge a sample would be far off."""
    rects = patch_grid(3, 5)
    x, y, sx, sy = 0.31, 0.72, 0.07, 0.2
    fine = patch_grid(3 * 60, 5 * 60)
    middle = (fine[:, :2] + fine[:, 2:]) / 2
    density = torch.exp(-0.5 * (((middle - torch.tensor([x, y])) / torch.tensor([sx, sy])) ** 2)
                        .sum(-1))  # fmt: skip
    summed = density.view(3, 60, 5, 60).sum((1, 3)).flatten()
    found = bell_mass(rects, [(x, y, sx, sy)])[0]
    torch.testing.assert_close(found, summed / summed.sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["overlap"])
def test_towards_a_spread_of_0_it_becomes_the_point(kind):
    points = [(0.3, 0.6), (0.9, 0.1), (0.31, 0.62)]
    rects = patch_grid(4, 4)
    bells = [(*point, 1e-9, 1e-9) for point in points]
    assert torch.equal(target_map(rects, kind=kind, bells=bells[:2]),
                       target_map(rects, kind=kind, points=points[:2]))  # fmt: skip
    found = target_map(rects, kind=kind, bells=bells)
    first, second = (row.nonzero().item() for row in maps.contains(rects, points[:2]))
    assert found[first].item() == pytest.approx(2 / 3)  # points add up, as fixations do
    assert found[second].item() == pytest.approx(1 / 3)


def test_each_point_counts_the_same_wherever_it_is():
    """Of a bell on the left edge half lies outside; the paper divides each point's map by its
    sum."""
    rects = patch_grid(1, 2)
    found = target_map(rects, bells=[(0.0, 0.5, 0.01, 0.01), (0.75, 0.5, 0.01, 0.01)])
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5]), rtol=0, atol=1e-7)


def test_a_bell_that_hardly_reaches_the_tokens_is_on_none():
    """A crop that keeps the right half; at 2.4 standard deviations from it .8 % are inside, at 2.3
    1.07 %."""
    crop = patch_grid(1, 2)
    crop[:, 0::2] = 0.5 + crop[:, 0::2] / 2
    assert phi(-2.4) < 0.01 < phi(-2.3)
    assert target_map(crop, bells=[(0.5 - 0.24, 0.5, 0.1, 0.1)]).tolist() == [0, 0]
    assert target_map(crop, bells=[(0.5 - 0.23, 0.5, 0.1, 0.01)])[0] > 0.97
    assert target_map(torch.full((3, 4), -1.0), bells=[(0.5, 0.5, 0.1, 0.1)]).tolist() == [0] * 3
    assert target_map(torch.zeros(0, 4), bells=[(0.5, 0.5, 0.1, 0.1)]).tolist() == []


def test_beside_a_shape_a_whole_bell_counts_as_much():
    grid = patch_grid(1, 4)
    bell = (0.875, 0.5, 0.01, 0.01)  # all of it in the last token
    found = target_map(grid, kind="uniform", levels=(2.0, 0.5, 0.0), boxes=[(0, 0, 0.25, 1)],
                       bells=[bell])  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([0.5, 0, 0, 0.5]), rtol=0, atol=1e-6)


def test_the_set_is_where_the_bell_is_half_as_high():
    """The ellipse at sqrt(2 ln 2) = 1.17741 standard deviations: .1 across is .117741."""
    (ring,) = outlines_of([(0.5, 0.5, 0.1, 0.2)])
    assert ring.shape == (64, 2)
    reach = math.sqrt(2 * math.log(2))
    assert float(ring[:, 0].max()) == pytest.approx(0.5 + 0.1 * reach)
    assert float(ring[:, 1].min()) == pytest.approx(0.5 - 0.2 * reach)
    heights = torch.exp(-0.5 * ((ring - 0.5) / torch.tensor([0.1, 0.2])).square().sum(-1))
    torch.testing.assert_close(heights, torch.full_like(heights, 0.5))
    across = maps.inside(patch_grid(1, 10), bells=[(0.45, 0.5, 0.1, 0.1)])  # .332 to .568
    assert across.tolist() == [False] * 3 + [True] * 3 + [False] * 4
    tiny = maps.inside(patch_grid(4, 4), bells=[(0.3, 0.3, 1e-4, 1e-4)])
    assert tiny.nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("bell", [(0.5, 0.5, 0.0, 0.1), (0.5, 0.5, 0.1, -0.1),
                                  (0.5, 0.5, math.nan, 1)])  # fmt: skip
def test_a_spread_that_is_not_above_0_is_refused(bell):
    for function in (target_map, maps.inside):
        with pytest.raises(ValueError, match="`bells`: expected spreads above 0"):
            function(patch_grid(2, 2), bells=[bell])


def test_shares_mix_targets():
    """(K8): shares 3 and 1 of (1, 0, 0) and (0, .5, .5): (.75, .125, .125)."""
    targets = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    assert maps.mixed(targets, [3.0, 1.0]).tolist() == [0.75, 0.125, 0.125]
    assert maps.mixed(targets, [0.5, 0.5]).tolist() == [0.5, 0.25, 0.25]
    lost = torch.tensor([[1.0, 0, 0], [0, 0, 0]])  # falls on no token: the others have all of it
    assert maps.mixed(lost, [1.0, 9.0]).tolist() == [1.0, 0, 0]
    assert maps.mixed(targets * 0, [1.0, 9.0]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="`shares`: expected numbers above 0"):
        maps.mixed(targets, [1.0, 0.0])
    with pytest.raises(ValueError, match="`shares`: expected 2 of them, got 1"):
        maps.mixed(targets, [1.0])


def test_tokens_become_pixels_by_exact_areas():
    """Three tokens across, two pixels: the middle token is half in each. .2 + .3 and .3 + .2 of
    (.2, .6, .2)."""
    found = maps.heat_of(patch_grid(1, 3), torch.tensor([0.2, 0.6, 0.2]), height=1, width=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]]))
    finer = maps.heat_of(patch_grid(1, 2), torch.tensor([3.0, 1.0]), height=2, width=3)
    # (2, 1 + 1/3, 2/3) over two rows
    torch.testing.assert_close(finer, torch.tensor([[1, 2 / 3, 1 / 3]] * 2))


def test_a_heat_of_tokens_is_the_target_of_the_same_tokens():
    generator = torch.Generator().manual_seed(3)
    for height, width in ((1, 1), (2, 3), (7, 5)):
        values = torch.rand(2, height * width, generator=generator)
        rects = patch_grid(height, width)
        heats = maps.heat_of(rects, values, height=height, width=width)
        assert heats.shape == (2, height, width)
        for heat, wanted in zip(heats, values / values.sum(-1, keepdim=True)):
            found = target_map(rects, rasters=[Raster(heat)])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_views_add_up_and_what_has_no_place_is_lost():
    """A whole view over two tiles of one token each, and a register token."""
    rects = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1], [-1, -1, -1, -1]])
    found = maps.heat_of(rects, torch.tensor([0.4, 0.1, 0.2, 9.0]), height=1, width=2)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.4]]))


def test_a_teacher_of_another_grid_teaches_the_mass_where_it_is():
    """A teacher of 3 x 3 looks at its middle token: on 2 x 2 that is four equal quarters; on 6 x 6
    the four tokens in the middle."""
    values = torch.zeros(9)
    values[4] = 1.0
    heat = Raster(maps.heat_of(patch_grid(3, 3), values, height=3, width=3))
    assert target_map(patch_grid(2, 2), rasters=[heat]).tolist() == [0.25] * 4
    found = target_map(patch_grid(6, 6), rasters=[heat]).view(6, 6)
    assert found[2:4, 2:4].tolist() == [[0.25] * 2] * 2
    assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3), r"`values`: expected \[..., 4\], one a rectangle, got \[3\]"),
        (torch.tensor(1.0), "one a rectangle"),
        (torch.tensor([1.0, -1, 0, 0]), "`values`: expected finite numbers >= 0"),
        (torch.tensor([1.0, math.nan, 0, 0]), "`values`: expected finite numbers >= 0"),
        (torch.tensor([1.0, math.inf, 0, 0]), "`values`: expected finite numbers >= 0"),
    ],
)
def test_values_that_are_no_map_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        maps.heat_of(patch_grid(2, 2), values, height=2, width=2)


def test_a_peak_keeps_the_ratio_of_heats():
    """The same plane, of which 1 or 2 counts in full: half as much, and a set only of the first."""
    plane = torch.tensor([[0.0, 1.0]])
    full, half = Raster(plane, peak=1.0), Raster(plane, peak=2.5)
    rects = patch_grid(1, 2)
    assert maps.target_values(rects, rasters=[full]).tolist() == [0, 1]
    assert maps.target_values(rects, rasters=[half]).tolist() == [0, 0.4]
    assert maps.inside(rects, rasters=[full]).tolist() == [False, True]
    assert half.mask() is None
    assert maps.inside(rects, rasters=[half]).tolist() == [False, False]
    for peak in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`peak`: expected the heat's 1\.0 or more"):
            Raster(plane, peak=peak)
    with pytest.raises(ValueError, match="`peak`: expected None for a mask"):
        Raster(plane > 0, peak=1.0)


def test_many_bells_are_the_sum_of_each() -> None:
    """More than are integrated at a time, on a pyramid; a record of gaze has thousands."""
    rects = torch.cat([patch_grid(6, 5), patch_grid(2, 2), torch.full((1, 4), -1.0)])
    bells = torch.rand(150, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.2, 0.2]) + 0.01
    one_by_one = sum(target_map(rects, bells=bells[n : n + 1]).double() for n in range(150))
    found = target_map(rects, bells=bells)
    torch.testing.assert_close(found.double(), one_by_one / 150, rtol=1e-5, atol=1e-9)
