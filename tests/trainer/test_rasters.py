"""Masks and heats of a sample: what they decode to, and a clear error for each way to be wrong."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundkern.maps import patch_grid, raster_overlap
from groundkern.trainer.data import run_lengths
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample

WIDTH, HEIGHT = 40, 20
BOX = (slice(5, 15), slice(10, 30))  # rows, columns of the mask that all files here show
PICTURE = [{"type": "image"}, {"type": "text", "text": "Where?"}]


def inside(scale: int = 1) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[BOX] = True
    return mask.repeat(scale, 0).repeat(scale, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    grey = np.uint8(inside() * 255)

    def save(image, name, **options):
        image.save(folder / name, **options)

    save(Image.fromarray(grey), "grey.png")
    save(Image.fromarray(np.uint8(inside(3))), "large.png")
    save(Image.fromarray(np.uint8(inside()[::5, ::5])), "small.png")
    save(Image.fromarray(grey).convert("1"), "one.png", bits=1)
    labels = Image.fromarray(np.uint8(inside() * 7 + (np.arange(WIDTH) == 0) * 3), "P")
    labels.putpalette(bytes([0, 0, 0] + [9, 9, 9] * 255))
    save(labels, "labels.png", transparency=0)
    save(labels, "four_bits.png", bits=4)
    save(Image.fromarray(np.uint16(inside() * 700)), "deep.png")
    blue = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blue[..., 2] = grey
    save(Image.fromarray(blue), "blue.png")
    save(Image.fromarray(np.dstack([blue, np.full_like(grey, 255)])), "opaque.png")
    save(Image.fromarray(np.dstack([blue, grey])), "clear.png")
    save(Image.fromarray(np.uint8(inside().T * 255)), "across.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    save(Image.fromarray(np.uint8(np.rot90(inside()) * 255)), "turned.png", exif=turned)
    save(Image.new("L", (WIDTH, HEIGHT)), "empty.png")
    save(Image.new("L", (500, 250)), "many.png")
    save(Image.fromarray(grey), "mask.jpg")
    (folder / "cut.png").write_bytes((folder / "deep.png").read_bytes()[:-30])
    ramp = np.linspace(0, 1, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    save(Image.fromarray(np.uint8(ramp * 255)), "heat8.png")
    save(Image.fromarray(np.uint16(ramp * 65535)), "heat16.png")
    for name, values in {
        "float": ramp * 1e300,
        "half": ramp.astype(np.float16),
        "swapped": ramp.astype(">f4"),
        "int": np.int64(inside()) * 5,
        "columns": np.asfortranarray(ramp),
        "square": np.eye(6),
        "across": ramp.T,
        "negative": ramp - 0.5,
        "nan": np.where(ramp > 0.5, np.nan, ramp),
        "inf": np.where(ramp > 0.5, np.inf, ramp),
        "zeros": ramp * 0,
        "flat": ramp.reshape(-1),
        "none": ramp[:0],
        "complex": ramp * 1j,
        "fields": np.zeros((HEIGHT, WIDTH), [("a", "f4")]),
        "wide": ramp.astype(np.longdouble),
        "many": np.zeros((250, 500), np.uint8),
    }.items():
        np.save(folder / f"{name}.npy", values)
    np.save(folder / "object.npy", np.array([[{}] * WIDTH] * HEIGHT, object), allow_pickle=True)
    (folder / "short.npy").write_bytes((folder / "float.npy").read_bytes()[:-8])
    (folder / "text.npy").write_text("no array")
    np.savez(folder / "zip.npz", ramp)
    (folder / "zip.npz").rename(folder / "zip.npy")
    return folder


def record(**place) -> dict:
    messages = [{"role": "user", "content": PICTURE}, {"role": "assistant", "content": "a cat"}]
    return {"images": ["a.png"], "messages": messages, "regions": [{"text": "cat", **place}]}


def raster(root, **place):
    sample = parse_sample(
        json.dumps(record(**place)), root=root, where="a.jsonl:1", max_pixels=9999
    )
    assert sample.regions[0].rasters == ()  # pixels wait until they are asked for
    (found,) = sample.load().regions[0].rasters
    return found


@pytest.mark.parametrize(
    "place",
    [
        {"mask": "grey.png"},
        {"mask": "one.png"},
        {"mask": "one.png", "mask_value": 1},
        {"mask": "labels.png", "mask_value": 7},
        {"mask": "four_bits.png", "mask_value": 7},
        {"mask": "deep.png"},
        {"mask": "deep.png", "mask_value": 700},
        {"mask": "blue.png"},
        {"mask": "blue.png", "mask_value": 255 << 16},
        {"mask": "opaque.png"},
        {"mask": "turned.png"},
        {"mask": run_lengths.encoded(inside())},
        {"mask": {"size": [20, 40], "counts": [205, *[10, 10] * 19, 10, 205]}},
    ],
)
def test_each_kind_of_mask_is_the_same_pixels(root, place):
    found = raster(root, **place)
    assert not found.heat
    assert np.array_equal(found.values.numpy(), inside())


def test_masks_of_other_resolutions_are_stretched(root):
    assert np.array_equal(raster(root, mask="large.png").values.numpy(), inside(3))
    grid = patch_grid(4, 8)
    small = raster(root, mask="small.png")
    assert small.values.shape == (4, 8)
    same = raster_overlap(grid, small), raster_overlap(grid, raster(root, mask="grey.png"))
    assert same[0].tolist() == same[1].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_over_the_image_as_people_see_it(tmp_path, orientation):
    """The image and, in the second region, the mask say by EXIF how they are turned."""
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    upright = Image.fromarray(np.uint8(inside() * 200))
    upright.putpixel((1, 2), 200)  # else it looks the same from all sides
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "a.png", exif=exif)
    stored.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    value = record(mask="upright.png")
    value["regions"].append({"text": "a", "mask": "turned.png"})
    example = parse_sample(value, root=tmp_path, where="a").load()
    seen = np.asarray(example.images[0])[..., 0] > 0
    for region in example.regions:
        assert np.array_equal(region.rasters[0].values.numpy(), seen)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow reads but does not write."""
    height, width = values.shape
    rows = b""
    for row in values.tolist():
        written = "".join(f"{value:0{bits}b}" for value in row)
        written += "0" * (-len(written) % 8)
        rows += bytes([0, *(int(written[i : i + 8], 2) for i in range(0, len(written), 8))])
    made = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
    return made


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_the_numbers_that_were_written(root, bits):
    """Pillow multiplies grey of 2 and 4 bits up to 255."""
    (root / "few.png").write_bytes(grey_png(inside().astype(int), bits))
    assert np.array_equal(raster(root, mask="few.png", mask_value=1).values.numpy(), inside())
    assert np.array_equal(raster(root, heat="few.png").values.numpy(), np.float32(inside()))


def test_a_label_image_without_a_value_is_all_of_its_labels(root):
    found = raster(root, mask="labels.png").values.numpy()
    assert np.array_equal(found, inside() | (np.arange(WIDTH) == 0))


def test_the_border_that_voc_leaves_open_is_inside_only_by_its_number(root):
    edge = np.arange(WIDTH) == 0
    labels = Image.fromarray(np.uint8(np.where(edge, 255, inside() * 7)), "P")
    for palette, void in (([224, 224, 192], True), ([255, 255, 255], False)):
        labels.putpalette([0, 0, 0] * 255 + palette)
        labels.save(root / "voc.png")
        wanted = inside() if void else inside() | edge
        assert np.array_equal(raster(root, mask="voc.png").values.numpy(), wanted)
        assert raster(root, mask="voc.png", mask_value=255).values.sum() == HEIGHT


def test_regions_of_one_label_image_have_their_own_masks(root):
    value = record(mask="labels.png", mask_value=7)
    value["regions"] += [{"text": "a", "mask": "labels.png", "mask_value": 3}]
    value["regions"] += [{"text": "a", "box": [0, 0, 9, 9]}]
    regions = parse_sample(value, root=root, where="a").load().regions
    assert [int(r.values.sum()) for region in regions for r in region.rasters] == [200, HEIGHT]
    assert regions[2].rasters == ()


@pytest.mark.parametrize("name", ["heat8.png", "heat16.png", "float.npy", "half.npy", "swapped.npy",
                                  "columns.npy"])  # fmt: skip
def test_each_kind_of_heat_is_the_same_up_to_its_rounding(root, name):
    found = raster(root, heat=name)
    assert found.heat
    ramp = np.linspace(0, 1, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    rounding = {"heat8.png": 1 / 255, "half.npy": 5e-4}.get(name, 2e-5)
    assert np.abs(found.values.numpy() - ramp).max() <= rounding


def test_heats_of_whole_numbers_and_of_a_square_grid(root):
    assert np.array_equal(raster(root, heat="int.npy").values.numpy(), np.float32(inside()))
    assert raster(root, heat="square.npy").values.shape == (6, 6)
    assert np.array_equal(raster(root, heat="one.png").values.numpy(), np.float32(inside()))


RUNS = {"size": [20, 40], "counts": [0, 800]}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"mask": "grey.png", "box": [0, 0, 1, 1]}, "mask and heat, got box and mask"),
        ({"mask": 7}, '`regions[0].mask`: expected a path, or run lengths {"size": [height,'),
        ({"mask": "there.png"}, "got 'there.png', which is not there"),
        ({"mask": "../a.png"}, "expected a relative path inside the data root"),
        ({"mask": "mask.jpg"}, "expected a PNG, got JPEG in 'mask.jpg'"),
        ({"mask": "int.npy"}, "expected a PNG or run lengths (an array is a `heat`), got 'int"),
        ({"mask": "many.png"}, "expected at most 9999 pixels, got 500 x 250 in 'many.png'"),
        ({"mask": "across.png"}, "a mask of the ratio of its image, 40 x 20, got 20 x 40"),
        ({"mask_value": 3, "box": [0, 0, 9, 9]}, "mask_value`: expected a label image as `mask`"),
        ({"mask": RUNS, "mask_value": 1}, "expected a label image for `mask_value`, got run"),
        ({"mask": "labels.png", "mask_value": True}, "mask_value`: expected a valid integer"),
        ({"mask": {"size": [20, 40]}}, "expected a path, or run lengths"),
        ({"mask": {**RUNS, "size": [20, 40.0]}}, "mask.size`: expected [height, width] in pixels"),
        ({"mask": {**RUNS, "size": [0, 40]}}, "mask.size`: expected [height, width] in pixels"),
        ({"mask": {**RUNS, "size": [40, 20]}}, "of the ratio of its image, 40 x 20, got 20 x 40"),
        ({"mask": {**RUNS, "size": [10**9, 10**9]}}, "expected at most 9999 pixels"),
        ({"mask": {**RUNS, "counts": [0, 799]}}, "lengths of 800 pixels together, got 799"),
        ({"mask": {**RUNS, "counts": [-1, 801]}}, "expected lengths from 0 to 800, got -1"),
        ({"mask": {**RUNS, "counts": [10**30]}}, "expected lengths from 0 to 800, got 1000"),
        ({"mask": {**RUNS, "counts": [True, 799]}}, "expected lengths from 0 to 800, got True"),
        ({"mask": {**RUNS, "counts": [800]}}, "expected a mask with a pixel inside, got none"),
        ({"mask": {**RUNS, "counts": []}}, "of 800 pixels together, got 0"),
        ({"mask": {**RUNS, "counts": None}}, "counts`: expected a list of lengths or a string"),
        ({"mask": {**RUNS, "counts": "0`"}}, "counts`: expected a string of COCO's run lengths"),
        ({"mask": {**RUNS, "counts": ""}}, "counts`: expected a string of COCO's run lengths"),
        ({"mask": {**RUNS, "counts": "0\u00e9"}}, "counts`: expected a string of COCO's run"),
        ({"mask": {**RUNS, "counts": "!!"}}, "counts`: expected a string of COCO's run lengths"),
        ({"mask": {**RUNS, "counts": "o" * 9 + "0"}}, "numbers of at most 7 characters"),
        ({"mask": {**RUNS, "counts": "0O"}}, "expected lengths from 0 to 800, got -1"),
        ({"heat": ""}, "`regions[0].heat`: expected"),
        ({"heat": "there.npy"}, "got 'there.npy', which is not there"),
        ({"heat": "/etc/passwd.npy"}, "expected a relative path inside the data root"),
        ({"heat": "across.npy"}, "ratio of its image, 40 x 20 (or a square one), got 20 x 40"),
        ({"heat": "mask.jpg"}, "expected a PNG, got JPEG"),
        ({"heat": "flat.npy"}, "expected numbers [height, width], of at most 8 bytes each, got fl"),
        ({"heat": "complex.npy"}, "of at most 8 bytes each, got complex128 [20, 40]"),
        ({"heat": "wide.npy"}, "of at most 8 bytes each, got"),
        ({"heat": "fields.npy"}, "of at most 8 bytes each, got"),
        ({"heat": "none.npy"}, "expected"),
        ({"heat": "many.npy"}, "expected 1 to 9999 numbers, got 500 x 250 in 'many.npy'"),
        ({"heat": "object.npy"}, "expected a .npy of plain numbers, got 'object.npy'"),
        ({"heat": "short.npy"}, "expected a .npy of plain numbers, got 'short.npy'"),
        ({"heat": "text.npy"}, "expected a .npy of plain numbers, got 'text.npy'"),
        ({"heat": "zip.npy"}, "expected a .npy of plain numbers, got 'zip.npy'"),
    ],
)  # fmt: skip
def test_bad_rasters_are_found_before_a_pixel_is_read(root, place, message):
    with pytest.raises(SampleError) as caught:
        parse_sample(json.dumps(record(**place)), root=root, where="a.jsonl:1", max_pixels=9999)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"mask": "empty.png"}, "a mask with a pixel that is not 0, got none in 'empty.png'"),
        ({"mask": "labels.png", "mask_value": 9}, "with a pixel of the value 9, got none in 'la"),
        ({"mask": "blue.png", "mask_value": 255}, "with a pixel of the value 255, got none in 'b"),
        ({"mask": "clear.png"}, "without transparent pixels, which may mean in or out"),
        ({"mask": "cut.png"}, "`regions[0].mask`: expected an image that can be decoded"),
        ({"heat": "blue.png"}, "expected a grey PNG, got mode RGB in 'blue.png'"),
        ({"heat": "labels.png"}, "expected a grey PNG, got mode P in 'labels.png'"),
        ({"heat": "empty.png"}, "expected a heat with a number above 0, got zeros"),
        ({"heat": "zeros.npy"}, "expected a heat with a number above 0, got zeros"),
        ({"heat": "negative.npy"}, "expected a heat of finite numbers >= 0, got -0.5 to 0.5"),
        ({"heat": "nan.npy"}, "expected a heat of finite numbers >= 0, got nan to nan"),
        ({"heat": "inf.npy"}, "expected a heat of finite numbers >= 0, got 0.0 to inf"),
    ],
)
def test_bad_pixels_are_a_bad_sample_when_its_turn_comes(root, place, message):
    sample = parse_sample(json.dumps(record(**place)), root=root, where="a.jsonl:1")
    with pytest.raises(SampleError) as caught:
        sample.load()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "good"),
    [((40, 20), True), ((13, 7), True), ((13, 6), True), ((1, 1), True), ((119, 60), True),
     ((8, 8), False), ((40, 22), False), ((400, 240), False)],
)  # fmt: skip
def test_the_ratio_may_differ_by_the_rounding_of_a_pixel(root, size, good):
    width, height = size
    value = record(mask={"size": [height, width], "counts": [0, width * height]})
    if good:
        assert len(parse_sample(value, root=root, where="a").rasters) == 1
    else:
        with pytest.raises(SampleError, match="ratio"):
            parse_sample(value, root=root, where="a")


def test_the_same_record_is_the_same_sample(root):
    value = record(mask=run_lengths.encoded(inside()))
    first, second = (parse_sample(value, root=root, where="a") for _ in range(2))
    assert first == second
    assert first != replace(second, rasters=())


def test_known_strings_of_coco():
    """By hand: 5 bits a character from `0`, 32 more if another follows; the 4th is a difference."""
    read = {"where": "a", "field": "b"}
    assert run_lengths.read_counts("32", 5, **read).tolist() == [3, 2]
    assert run_lengths.read_counts("R1`4", 178, **read).tolist() == [32 + 2, 16 + 4 * 32]
    # 3, 2, 4, 2 - 1, 4 + 1: -1 is one character, all ones
    assert run_lengths.read_counts("324O1", 15, **read).tolist() == [3, 2, 4, 1, 5]


MASKS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(MASKS)
def test_run_lengths_there_and_back(drawn):
    height, width, bits = drawn
    mask = np.array([bits >> i & 1 for i in range(height * width)], bool).reshape(height, width)
    made = run_lengths.encoded(mask)
    runs = run_lengths.read_counts(made["counts"], mask.size, where="a", field="b")
    assert made["size"] == [height, width]
    assert np.array_equal(run_lengths.decoded(runs, height, width), mask)
    column_by_column = [bool(mask[y, x]) for x in range(width) for y in range(height)]
    assert [k % 2 == 1 for k, n in enumerate(runs.tolist()) for _ in range(n)] == column_by_column
