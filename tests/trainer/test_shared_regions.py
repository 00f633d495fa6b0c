"""`spread`, `share` and several intervals of a data file: what they become, what is refused."""

from __future__ import annotations

import pytest
from PIL import Image

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample

WIDTH, HEIGHT = 80, 40
POINT = {"points": [[20, 10], [40, 30]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    (folder / "clip").mkdir()
    for i in range(4):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "clip" / f"{i}.png")
    return folder


def regions(root, *places, video=False):
    kind = "video" if video else "image"
    media = {"videos": [{"path": "clip", "fps": 1}]} if video else {"images": ["a.png"]}
    messages = [
        {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    given = [{"text": "cat", **place} for place in places]
    record = {**media, "messages": messages, "regions": given}
    return parse_sample(record, root=root, where="a:1").regions


@pytest.mark.parametrize(
    ("place", "spread"),
    [
        ({"spread": 8}, (0.1, 0.2)),  # 8 pixels of 80 x 40
        ({"spread": [8, 8]}, (0.1, 0.2)),
        ({"spread": [8, 4]}, (0.1, 0.1)),
        ({"spread": 0.1, "coord": "unit"}, (0.1, 0.2)),  # of the width, as many pixels down
        ({"spread": [0.1, 0.1], "coord": "unit"}, (0.1, 0.1)),
        ({"spread": 100, "coord": "per_mille"}, (0.1, 0.2)),
    ],
)
@pytest.mark.parametrize("video", [False, True])
def test_a_spread_is_one_of_every_point(root, place, spread, video):
    scale = {"unit": (1 / WIDTH, 1 / HEIGHT), "per_mille": (1000 / WIDTH, 1000 / HEIGHT)}
    across, down = scale.get(place.get("coord"), (1, 1))
    points = [[x * across, y * down] for x, y in POINT["points"]]
    (region,) = regions(root, {"points": points, **place}, video=video)
    assert region.points == ()
    for bell, middle in zip(region.bells, ((0.25, 0.25), (0.5, 0.75)), strict=True):
        assert bell == pytest.approx((*middle, *spread))


@pytest.mark.parametrize("spread", [0, [0, 0.0]])
def test_a_spread_of_0_is_the_point(root, spread):
    assert regions(root, {**POINT, "spread": spread}) == regions(root, POINT)


def test_shares_are_of_a_region_and_of_its_intervals(root):
    (alone, other) = regions(root, {**POINT, "share": 2}, POINT)
    assert (alone.share, other.share) == (2, None)
    intervals = [[0, 1], [2, 3.5]]
    found = regions(root, {"time": intervals, "share": [1, 4]}, {"time": intervals}, video=True)
    assert [region.time for region in found] == [(0, 1), (2, 3.5)] * 2
    assert [region.share for region in found] == [1, 4, None, None]
    found = regions(root, {"time": intervals, "share": 5}, video=True)
    assert [region.share for region in found] == [2, 3]  # by their lengths
    assert regions(root, {"time": [[0, 1]]}, video=True) == regions(
        root, {"time": [0, 1]}, video=True
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({**POINT, "spread": -1}, "`regions[0].spread`: expected numbers above 0, up to the 80 "),
        ({**POINT, "spread": [8, 0]}, "`regions[0].spread`: expected numbers above 0"),
        ({**POINT, "spread": 41}, "`regions[0].spread`: expected numbers above 0"),
        ({**POINT, "spread": [1, 2, 3]}, "`regions[0].spread`: expected a number, or [x, y], got"),
        ({**POINT, "spread": []}, "`regions[0].spread`: expected a number, or [x, y], got []"),
        ({**POINT, "spread": "8"}, "`regions[0].spread`: expected"),
        ({"box": [0, 0, 9, 9], "spread": 8}, "`regions[0].spread`: expected `points` that have it"),
        ({**POINT, "share": 0}, "`regions[0].share[0]`: expected greater than 0, got 0"),
        ({**POINT, "share": [1, 2]}, "share`: expected a number, or one for each of 1 intervals"),
        ({**POINT, "share": True}, "`regions[0].share[0]`: expected a valid number, got True"),
    ],
)  # fmt: skip
def test_bad_spreads_and_shares_are_named(root, place, message):
    with pytest.raises(SampleError) as caught:
        regions(root, place)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"time": []}, "`regions[0].time"),
        ({"time": [[0, 1], [2]]}, "`regions[0].time[1][1]`: expected a value, got nothing"),
        ({"time": [[0, 1], [1, 1]]}, "`regions[0].time[1]`: expected [t0, t1] in seconds"),
        ({"time": [[0, 2], [1, 3]]}, "`regions[0].time[1]`: expected intervals that ascend, fro"),
        ({"time": [[0, 1], [9, 10]]}, "`regions[0].time[1]`: expected a time within the 4.000 s"),
        ({"time": [[0, 1], [2, 9]]}, "`regions[0].time[1]`: expected a time within the 4.000 s"),
        ({"time": [[0, 1], [2, 3]], "share": [1, 2, 3]}, "one for each of 2 intervals, got"),
    ],
)  # fmt: skip
def test_bad_intervals_are_named(root, place, message):
    with pytest.raises(SampleError) as caught:
        regions(root, place, video=True)
    assert message in str(caught.value)
