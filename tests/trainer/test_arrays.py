"""Heats as .npz and .safetensors: what they become, over time too, and what is refused."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from groundkern.hf.data.moments import moments_of
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample

WIDTH, HEIGHT, SECONDS = 40, 20, 3
PLANE = np.arange(HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
FILM = np.stack([PLANE * 0, PLANE, PLANE * 4])
TIMES = np.array([0.0, 1.0, 2.0])


class Hostile:
    """Its pickle would leave a file behind."""

    def __reduce__(self):
        return open, ("/tmp/groundkern_pickle_was_run", "w")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    (folder / "clip").mkdir()
    for i in range(SECONDS):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "clip" / f"{i}.png")
    np.savez(folder / "plane.npz", heat=PLANE)
    np.savez_compressed(folder / "film.npz", heat=FILM, times=TIMES)
    save_file({"heat": torch.tensor(PLANE).bfloat16()}, folder / "plane.safetensors")
    film = {"heat": torch.tensor(FILM), "times": torch.tensor(TIMES)}
    save_file(film, folder / "film.safetensors")
    np.save(folder / "film.npy", FILM)
    for name, more in {
        "timeless": {},
        "few": {"times": TIMES[:2]},
        "back": {"times": TIMES[::-1]},
        "early": {"times": TIMES - 1},
        "nan_times": {"times": TIMES * np.nan},
        "words": {"times": np.array(["a", "b", "c"])},
    }.items():
        np.savez(folder / f"{name}.npz", heat=FILM, **more)
    np.savez(folder / "negative.npz", heat=PLANE - 1)
    np.savez(folder / "nan.npz", heat=np.where(PLANE > 5, np.nan, PLANE))
    np.savez(folder / "zeros.npz", heat=FILM * 0, times=TIMES)
    np.savez(folder / "named.npz", warmth=PLANE)
    objects = np.array([[Hostile()] * 2] * 2, object)
    np.savez(folder / "pickle.npz", heat=objects)
    with zipfile.ZipFile(folder / "bare_pickle.npz", "w") as archive:
        buffer = BytesIO()
        np.lib.format.write_array(buffer, objects, allow_pickle=True)
        archive.writestr("heat.npy", buffer.getvalue())
    _declare(folder / "huge.npz", (1 << 20, 1 << 20))
    _declare(folder / "endless.npz", (1 << 62, 1 << 62))
    _declare(folder / "short.npz", (HEIGHT, WIDTH))
    (folder / "text.npz").write_text("no zip")
    (folder / "text.safetensors").write_text("no tensors")
    header = json.dumps({"heat": {"dtype": "F32", "shape": [99999, 99999],
                                  "data_offsets": [0, 4 * 99999**2]}}).encode()  # fmt: skip
    (folder / "huge.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def _declare(path, shape) -> None:
    """A .npz that says it holds so many numbers, and holds four."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("heat.npy", "w") as file:  # fmt: skip
        layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, layout)
        file.write(b"\0" * 16)


def record(heat: str, **place) -> str:
    video = place.pop("video", None)
    kind = "image" if video is None else "video"
    media = {"images": ["a.png"]} if video is None else {"videos": [{"path": "clip", "fps": 1}]}
    messages = [
        {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    region = {"text": "cat", "heat": heat, **place}
    return json.dumps({**media, "messages": messages, "regions": [region]})


def loaded(root, heat: str, **place):
    where = {"root": root, "where": "a.jsonl:1", "max_pixels": 9999}
    return parse_sample(record(heat, **place), **where).load()


@pytest.mark.parametrize("name", ["plane.npz", "plane.safetensors"])
def test_a_plane_is_the_heat_of_an_image_and_of_a_time(root, name):
    wanted = torch.tensor(PLANE / PLANE.max())
    rounding = 2**-7 if name.endswith("safetensors") else 1e-7  # bfloat16's, twice
    for place in ({}, {"video": 0, "time": [1, 2]}):
        (region,) = loaded(root, name, **place).regions
        (raster,) = region.rasters
        torch.testing.assert_close(raster.values, wanted, rtol=rounding, atol=0)
        assert region.time == ((1, 2) if place else None)


@pytest.mark.parametrize("name", ["film.npz", "film.safetensors"])
def test_a_film_is_each_map_at_its_time_on_one_scale(root, name):
    example = loaded(root, name, video=0)
    (region,) = example.regions
    assert not region.rasters
    assert [time for time, _ in region.raster_track] == [0, 1, 2]
    nothing, weak, strong = (raster for _, raster in region.raster_track)
    assert nothing is None
    assert float(weak.values.max()) == 0.25  # a quarter of the hottest of all times
    assert weak.most == strong.most == float(strong.values.max()) == 1
    assert [moment.time for moment in moments_of([region], example.videos[0])] == [1, 2]
    example = loaded(root, name, video=0, time=[[0, 1], [2, 3]])
    first, second = example.regions
    assert moments_of([first], example.videos[0]) == []
    (moment,) = moments_of([second], example.videos[0])
    assert torch.equal(moment.shapes["rasters"][0].values, strong.values)


@pytest.mark.parametrize(
    ("heat", "place", "message"),
    [
        ("film.npz", {}, "expected numbers [height, width], of at most 8 bytes each, got float32 "
         "[3, 20, 40] in 'film.npz'"),
        ("film.npy", {"video": 0}, "expected numbers [height, width], of at most 8 bytes each"),
        ("timeless.npz", {"video": 0}, "expected a .npz of plain numbers, got 'timeless.npz' ("),
        ("few.npz", {"video": 0}, "`times` beside the heat: 3 seconds that ascend, from 0, got "
         "float64 [2]"),
        ("back.npz", {"video": 0}, "3 seconds that ascend, from 0, got [2.0, 1.0, 0.0]"),
        ("early.npz", {"video": 0}, "3 seconds that ascend, from 0, got [-1.0, 0.0, 1.0]"),
        ("nan_times.npz", {"video": 0}, "3 seconds that ascend, from 0, got [nan, nan, nan]"),
        ("words.npz", {"video": 0}, "3 seconds that ascend, from 0, got <U1 [3]"),
        ("named.npz", {}, "expected a .npz of plain numbers, got 'named.npz'"),
        ("pickle.npz", {}, "of at most 8 bytes each, got object [2, 2]"),
        ("bare_pickle.npz", {}, "of at most 8 bytes each, got object [2, 2]"),
        ("huge.npz", {}, "expected 1 to 9999 numbers, got 1048576 x 1048576 in 'huge.npz'"),
        ("endless.npz", {}, "expected 1 to 9999 numbers, got 4611686018427387904 x"),
        ("text.npz", {}, "expected a .npz of plain numbers, got 'text.npz'"),
        ("text.safetensors", {}, "expected a .safetensors of plain numbers, got 'text.safetens"),
        ("huge.safetensors", {}, "expected a .safetensors of plain numbers, got 'huge.safetens"),
        ("gone.npz", {}, "got 'gone.npz', which is not there"),
        ("../a.npz", {}, "inside the data root"),
    ],
)  # fmt: skip
def test_bad_arrays_are_found_by_their_headers(root, heat, place, message):
    where = {"root": root, "where": "a.jsonl:1", "max_pixels": 9999}
    with pytest.raises(SampleError) as caught:
        parse_sample(record(heat, **place), **where)
    assert "`regions[0].heat`: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("heat", "place", "message"),
    [
        ("negative.npz", {}, "expected a heat of finite numbers >= 0, got -1.0 to 798.0"),
        ("nan.npz", {}, "expected a heat of finite numbers >= 0, got nan to nan"),
        ("zeros.npz", {"video": 0}, "expected a heat with a number above 0, got zeros"),
        ("short.npz", {}, "expected a .npz of plain numbers, got 'short.npz'"),
    ],
)
def test_bad_numbers_are_found_when_they_are_read(root, heat, place, message):
    with pytest.raises(SampleError) as caught:
        loaded(root, heat, **place)
    assert message in str(caught.value)


def test_no_pickle_was_run(root):
    from pathlib import Path

    for name in ("pickle.npz", "bare_pickle.npz"):
        with pytest.raises(SampleError):
            loaded(root, name)
    assert not Path("/tmp/groundkern_pickle_was_run").exists()


def test_an_array_that_changed_since_its_header_was_read_is_refused(root):
    name = "changing.npz"
    np.savez(root / name, heat=PLANE)
    where = {"root": root, "where": "a.jsonl:1", "max_pixels": 9999}
    sample = parse_sample(record(name), **where)
    np.savez(root / name, heat=np.ones((400, 800)))
    with pytest.raises(SampleError, match=r"the heat of \[20, 40\] that was there, got float64 \["):
        sample.load()
