"""The canonical sample: what it resolves to, and one clear error for each way to get it wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from groundkern.hf.data.example import GroundedExample, Phrase, Region, Word
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample

WIDTH, HEIGHT = 40, 20
ANSWER = "the cat sat on the mat"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30)).save(folder / "a.png")
    Image.new("RGB", (30, 30)).save(folder / "b.png")
    return folder


def record(**changes) -> dict:
    question = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWER},
    ]
    base = {"images": ["a.png"], "messages": messages}
    base.update(changes)
    return base


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def region(**changes) -> dict:
    return record(regions=[{"text": "cat", "box": [0, 0, 10, 10], **changes}])


def parse(value, root, **options):
    return parse_sample(value, root=root, where="data.jsonl:7", **options)


def refused(value, root, **options) -> str:
    with pytest.raises(SampleError) as caught:
        parse(value, root, **options)
    message = str(caught.value)
    assert message.startswith("data.jsonl:7: ")
    assert "expected" in message
    assert ", got " in message
    assert "\n" not in message
    return message


# what a sample resolves to


def test_everything_at_once(root):
    value = record(
        task="demo",
        regions=[
            {"text": "cat", "box": [10, 5, 20, 15]},
            {"char_span": [4, 11], "points": [[500, 500]], "coord": "per_mille", "turn": 1},
            {"text": "mat", "polygon": [[0, 0], [1, 0], [1, 0.5]], "coord": "unit", "image": 0},
            {"text": "sat", "polyline": [[0, 0], [40, 10], [20, 20]]},
        ],
        words=[{"text": "exit", "box": [30, 10, 10, 10], "order": "xywh"}],
        phrases=[{"text": "the mat", "subject": "mat"}, {"text": "the cat"}],
        answers=["a cat on a mat"],
        metrics=["anls"],
    )
    sample = parse(json.dumps(value).encode(), root)
    assert sample.task == "demo"
    assert sample.sizes == ((WIDTH, HEIGHT),)
    assert sample.regions == (
        Region(1, 4, 7, 0, boxes=((0.25, 0.25, 0.5, 0.75),)),
        Region(1, 4, 11, 0, points=((0.5, 0.5),)),
        Region(1, 19, 22, 0, polygons=(((0, 0), (1, 0), (1, 0.5)),)),
        Region(1, 8, 11, 0, polylines=(((0, 0), (1, 0.5), (0.5, 1)),)),
    )
    assert sample.words == (Word("exit", (0.75, 0.5, 1.0, 1.0), 0),)
    assert sample.phrases == (Phrase(1, 15, 22, (19, 22)), Phrase(1, 0, 7, None))
    assert (sample.answers, sample.metrics) == (("a cat on a mat",), ("anls",))
    example = sample.load()
    assert example.name == "data.jsonl:7"
    assert example.regions == sample.regions
    assert example.images[0].mode == "RGB"
    assert example.images[0].size == (WIDTH, HEIGHT)
    assert example.messages[1] == {"role": "assistant", "content": ANSWER}
    assert example.messages[0]["content"][0] == {"type": "image"}


def test_text_only_sample_needs_nothing_else(root):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    example = parse({"messages": messages}, root).load()
    assert example.images == ()
    assert example.messages == messages


def test_several_turns_and_images(root):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": [text("a "), text("dog")]},
    ]
    place = {"text": "dog", "turn": 4, "image": 1, "box": [15, 0, 30, 30]}
    sample = parse({"images": ["a.png", "b.png"], "messages": messages, "regions": [place]}, root)
    assert sample.regions == (Region(4, 2, 5, 1, boxes=((0.5, 0.0, 1.0, 1.0),)),)
    assert [image.size for image in sample.load().images] == [(40, 20), (30, 30)]


def test_occurrence_counts_from_zero_and_may_overlap(root):
    assert parse(region(text="the", occurrence=1), root).regions[0].start == 15
    messages = [{"role": "assistant", "content": "aaa"}]
    place = {"text": "aa", "occurrence": 1, "box": [0, 0, 1, 1]}
    assert parse(record(messages=messages, regions=[place]), root).regions[0].start == 1


@given(
    x0=st.floats(0, 0.98),
    y0=st.floats(0, 0.98),
    width=st.floats(0.01, 1),
    height=st.floats(0.01, 1),
    order=st.sampled_from(["xyxy", "xywh"]),
)
def test_coordinate_kinds_agree(root, x0, y0, width, height, order):
    x1, y1 = min(1, x0 + width), min(1, y0 + height)
    second = (x1, y1) if order == "xyxy" else (x1 - x0, y1 - y0)
    found = []
    for coord, (across, down) in {
        "unit": (1, 1),
        "per_mille": (1000, 1000),
        "pixel": (WIDTH, HEIGHT),
    }.items():
        box = [x0 * across, y0 * down, second[0] * across, second[1] * down]
        if coord == "pixel" and max(box) <= 1:
            continue  # within the first pixel: refused as fractions
        found += parse(region(box=box, coord=coord, order=order), root).regions[0].boxes
    for box in found:
        assert np.allclose(box, (x0, y0, x1, y1), atol=2e-6)
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1


@given(
    box=st.tuples(*[st.floats(-2e-6, 1 + 2e-6) | st.sampled_from([0, 1, 1e-320, 1 - 1e-16])] * 4),
    span=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    coord=st.sampled_from(["unit", "per_mille", "pixel"]),
)
def test_what_the_parser_accepts_passes_the_own_check_of_an_example(root, box, span, coord):
    """So that an example that comes from a file needs no second check."""
    messages = [*record()["messages"][:1], {"role": "assistant", "content": "a  b \n \u00a0c"}]
    place = {"char_span": span, "box": box, "coord": coord}
    phrase = {"char_span": span}
    try:
        sample = parse(record(messages=messages, regions=[place], phrases=[phrase]), root)
    except SampleError:
        return
    example = GroundedExample(
        ("an image",), sample.messages, sample.regions, (), sample.phrases, sample.where
    )
    assert not example.checked
    example.check()
    assert sample.load().checked


# what is wrong with a region


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box": [0, 0, 41, 10]}, "`regions[0].box`: expected pixel coordinates within image 0"),
        ({"box": [0, 0, 41, 10]}, "got [0.0, 0.0, 41.0, 10.0]"),
        ({"box": [0, 0, 900, 10]}, 'got [0.0, 0.0, 900.0, 10.0] ("coord": "per_mille" is for 0'),
        ({"box": [0.1, 0.2, 0.5, 0.6]}, 'expected pixels, or "coord": "unit" for 0 to 1, got [0.1'),
        ({"box": None, "points": [[0.1, 0.2]]}, 'points`: expected pixels, or "coord": "unit" for'),
        ({"box": [-1, 0, 9, 10]}, "got [-1.0, 0.0, 9.0, 10.0]"),
        ({"box": [0, 0, 1.5, 1], "coord": "unit"}, "unit coordinates within image 0, 1 x 1"),
        ({"box": [0, 0, 1001, 9], "coord": "per_mille"}, "within image 0, 1000 x 1000"),
        ({"box": [30, 0, 20, 10], "order": "xywh"}, "got [30.0, 0.0, 20.0, 10.0]"),
        ({"box": [10, 0, 5, 10]}, "`regions[0].box`: expected x0 < x1, y0 < y1"),
        ({"box": [5, 5, 5, 10]}, "`regions[0].box`: expected x0 < x1, y0 < y1"),
        ({"box": [5, 5, 0, 3], "order": "xywh"}, "expected positive width and height"),
        ({"box": [0, 0, float("nan"), 9]}, "regions[0].box[2]`: expected a finite number, got nan"),
        ({"box": [0, 0, float("inf"), 9]}, "regions[0].box[2]`: expected a finite number, got inf"),
        ({"box": [0, 0, "9", 9]}, "`regions[0].box[2]`: expected a valid number, got '9'"),
        ({"box": [0, 0, 9]}, "`regions[0].box[3]`: expected a value, got nothing"),
        ({"coord": "percent"}, "coord`: expected 'pixel', 'unit' or 'per_mille', got 'percent'"),
        ({"order": "yxyx"}, "`regions[0].order`: expected 'xyxy' or 'xywh', got 'yxyx'"),
        ({"text": "dog"}, "`regions[0].text`: expected text that occurs in message 1, 'the"),
        ({"text": ""}, "`regions[0].text`: expected"),
        ({"text": "the", "occurrence": 2}, "`regions[0].occurrence`: expected less than 2"),
        ({"char_span": [0, 3]}, "`regions[0]`: expected either text or char_span, got both"),
        ({"text": None}, "`regions[0]`: expected either text or char_span, got neither"),
        ({"text": None, "char_span": [3, 99]}, "[0].char_span`: expected 0 <= start < stop <= 22"),
        ({"text": None, "char_span": [3, 3]}, "got [3, 3]"),
        ({"text": None, "char_span": [3, 4]}, "`regions[0]`: expected a span of visible char"),
        ({"text": " "}, "expected a span of visible characters of 'the cat sat on the mat', got 3"),
        ({"box": [-1e-6, 0, -1e-7, 9], "coord": "pixel"}, "`regions[0].box`: expected x0 < x1"),
        ({"points": [[1, 1]]}, "polyline, mask and heat, got box and points"),
        ({"box": None, "polyline": [[1, 1]]}, "regions[0].polyline"),
        ({"box": None, "polyline": [[1, 1], [1, 1]]}, "expected a line with a length"),
        ({"box": None, "polyline": [[1, 1], [41, 1]]}, "within image 0, 40 x 20"),
        ({"box": None}, "polyline, mask and heat, got none"),
        ({"box": None, "points": [[1, 21]]}, "`regions[0].points`: expected pixel coordinates"),
        ({"box": None, "points": []}, "`regions[0].points`: expected"),
        ({"box": None, "polygon": [[0, 0], [1, 1]]}, "`regions[0].polygon`: expected"),
        ({"box": None, "polygon": [[0, 0], [1, 1], [2, 2]]}, "expected a polygon with an area"),
        ({"turn": 0}, "turn`: expected the index of an assistant message, [1], got 0 (user)"),
        ({"turn": 5}, "got 5 (no message)"),
        ({"image": 1}, "`regions[0].image`: expected an index of the sample's 1 images, got 1"),
        ({"image": -1}, "`regions[0].image`: expected greater than or equal to 0, got -1"),
        ({"colour": "red"}, "`regions[0].colour`: expected a field of the format"),
        ({"bbox": [1, 1, 2, 2]}, "an unknown name; did you mean `box`?"),
        ({"box": [9, 9, 4, 4]}, '[9.0, 9.0, 4.0, 4.0] ("order": "xywh" is for width and height)'),
        ({"box": [9, 9, 9, 0]}, "got [9.0, 9.0, 9.0, 0.0]"),
    ],
)  # fmt: skip
def test_bad_region(root, changes, message):
    assert message in refused(region(**changes), root)


def test_turn_and_image_must_be_named_when_there_are_several(root):
    messages = [*record()["messages"], {"role": "assistant", "content": "cat"}]
    got = refused({**region(), "messages": messages}, root)
    assert "`regions[0].turn`: expected one of the assistant messages [1, 2], got none" in got
    value = {**region(), "images": ["a.png", "b.png"], "messages": record()["messages"][1:]}
    assert "`regions[0].image`: expected one of the 2 images" in refused(value, root)


def test_region_without_an_image(root):
    value = {"messages": [{"role": "assistant", "content": "cat"}]}
    value["regions"] = region()["regions"]
    assert "`regions[0].image`: expected an index of the sample's 0 images" in refused(value, root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": [{"text": "  ", "box": [0, 0, 9, 9]}]}, "`words[0].text`: expected a word"),
        ({"words": [{"text": "a"}]}, "`words[0].box`: expected a value, got nothing"),
        ({"words": [{"text": "a", "box": [0, 0, 9, 21]}]}, "`words[0].box`: expected pixel"),
        ({"phrases": [{"text": "the cat", "subject": "mat"}]}, "subject`: expected words of"),
        ({"phrases": [{"text": "a dog"}]}, "`phrases[0].text`: expected text that occurs"),
        ({"answers": ["a", ""]}, "`answers[1]`: expected"),
        ({"answers": "a"}, "`answers`: expected a valid list, got 'a'"),
        ({"metrics": [1]}, "`metrics[0]`: expected a valid string, got 1"),
        ({"videos": "a.mp4"}, "`videos`: expected a valid list, got 'a.mp4'"),
        ({"image": "a.png"}, "`image`: expected a field of the format"),
        ({"region": []}, "an unknown name; did you mean `regions`?"),
        ({"messages": []}, "`messages`: expected"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "at least one assistant message"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "`messages[0].role`: expected 'system'"),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages[0].content`: expected"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected 'image', 'vi"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "in user messages"),
        ({"images": []}, "`messages`: expected 0 image parts, one for each image, or none, got 1"),
        ({"images": ["a.png", "b.png"]}, "`messages`: expected 2 image parts"),
    ],
)  # fmt: skip
def test_bad_field(root, changes, message):
    assert message in refused(record(**changes), root)


@pytest.mark.parametrize("text", ["<image>", "<|image_pad|>"])
def test_placeholder_written_as_text(root, text):
    messages = [{"role": "user", "content": f"{text}\nHi"}, record()["messages"][1]]
    got = refused(record(messages=messages), root)
    assert f'images as parts, {{"type": "image"}}, got the text {text}' in got


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [', "expected a JSON object, got invalid JSON"),
        (b"[1, 2]", "expected a JSON object, got [1, 2]"),
        (b"[" * 100_000, "expected a JSON object, got invalid JSON"),
        (b'{"task": "\xff"}', "expected UTF-8 text, got invalid start byte at byte 10"),
        (b'{"task": "\\ud800"}', "expected Unicode text, got half a surrogate pair"),
    ],
)  # fmt: skip
def test_bad_line(root, line, message):
    assert message in refused(line, root)


# what is wrong with an image


@pytest.mark.parametrize("path", ["/etc/hosts", "../a.png", "x/../../a.png", "", "a\0.png"])
def test_path_out_of_the_root(root, path):
    got = refused(record(images=[path]), root)
    assert "`images[0]`: expected a relative path inside the data root" in got


def test_link_out_of_the_root(root, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    link = root / "link.png"
    link.symlink_to(tmp_path / "outside.png")
    assert "`images[0]`: expected a path inside" in refused(record(images=["link.png"]), root)


def test_link_inside_the_root_is_fine(root):
    (root / "inside.png").symlink_to(root / "a.png")
    assert parse(record(images=["inside.png"]), root).sizes == ((WIDTH, HEIGHT),)


@pytest.mark.parametrize("path", ["none.png", ".", "n" * 300])
def test_missing_image(root, path):
    got = refused(record(images=[path]), root)
    assert "`images[0]`: expected" in got
    assert repr(path) in got


def test_image_that_is_none(root):
    (root / "text.png").write_text("not an image")
    got = refused(record(images=["text.png"]), root)
    assert "`images[0]`: expected an image in a known format, got 'text.png'" in got


def test_image_of_absurd_size(root):
    assert "`images[0]`: expected at most 799 pixels, got 40 x 20" in refused(
        record(), root, max_pixels=799
    )
    parse(record(), root, max_pixels=800)


def test_decompression_bomb_is_refused_by_its_header(root):
    """A PNG of a few bytes that says it is 60000 x 60000."""
    data = bytearray((root / "a.png").read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = _crc(data[12:29])
    (root / "bomb.png").write_bytes(data)
    got = refused(record(images=["bomb.png"]), root)
    assert "`images[0]`: expected an image of ordinary size" in got


def _crc(data) -> bytes:
    from zlib import crc32

    return crc32(bytes(data)).to_bytes(4, "big")


def test_strip(root):
    Image.new("RGB", (201, 1)).save(root / "strip.png")
    got = refused(record(images=["strip.png"]), root)
    assert "at most 200 times the shorter, got 201 x 1" in got


@pytest.mark.parametrize("kind", ["png", "jpg", "gif"])
def test_truncated_image_is_found_when_decoded(root, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / f"whole.{kind}")
    data = (root / f"whole.{kind}").read_bytes()
    (root / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    sample = parse(record(images=[f"cut.{kind}"]), root)
    with pytest.raises(SampleError, match=r"data.jsonl:7: `images\[0\]`: expected an image"):
        sample.load()


def test_image_that_changed_after_the_check(root):
    path = root / "changing.png"
    Image.new("RGB", (40, 20)).save(path)
    sample = parse(record(images=["changing.png"]), root)
    Image.new("RGB", (20, 40)).save(path)
    with pytest.raises(SampleError, match=r"expected 40 x 20 pixels, got 20 x 40"):
        sample.load()


# pixels


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_exif_rotation_comes_before_coordinates(root, kind):
    """Orientation 6: the stored image is turned a quarter clockwise before anything is measured."""
    stored = Image.new("RGB", (40, 20), "white")
    stored.paste((255, 0, 0), (0, 0, 10, 20))  # left edge as stored, top edge as seen
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(root / f"turned.{kind}", exif=exif)
    value = {**region(box=[0, 0, 20, 40]), "images": [f"turned.{kind}"]}
    sample = parse(value, root)
    assert sample.sizes == ((20, 40),)
    assert sample.regions[0].boxes == ((0, 0, 1, 1),)
    image = sample.load().images[0]
    assert image.size == (20, 40)
    top, bottom = image.getpixel((10, 3)), image.getpixel((10, 35))
    assert top[1] < 60
    assert bottom[1] > 200


def _grey_16() -> Image.Image:
    return Image.fromarray(np.full((20, 40), 128 * 257, dtype=np.uint16))


def _palette() -> Image.Image:
    return Image.new("RGB", (40, 20), (128, 128, 128)).quantize(4)


@pytest.mark.parametrize(
    ("name", "make", "wanted"),
    [
        ("grey16.png", _grey_16, (128, 128, 128)),
        ("grey16.tiff", _grey_16, (128, 128, 128)),
        ("palette.png", _palette, (128, 128, 128)),
        ("cmyk.jpg", lambda: Image.new("CMYK", (40, 20), (0, 255, 255, 0)), (255, 0, 0)),
        ("alpha.png", lambda: Image.new("RGBA", (40, 20), (0, 0, 0, 0)), (255, 255, 255)),
        ("grey_alpha.png", lambda: Image.new("LA", (40, 20), (0, 128)), (127, 127, 127)),
        ("bits.png", lambda: Image.new("1", (40, 20), 1), (255, 255, 255)),
    ],
)
def test_any_mode_becomes_rgb(root, name, make, wanted):
    make().save(root / name)
    image = parse(record(images=[name]), root).load().images[0]
    assert image.mode == "RGB"
    assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), wanted)) <= 2


def test_transparent_colour_of_a_palette_is_white(root):
    image = Image.new("P", (40, 20), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(root / "clear.png", transparency=0)
    assert parse(record(images=["clear.png"]), root).load().images[0].getpixel((5, 5)) == (255,) * 3


def test_depth_without_a_safe_meaning(root):
    Image.fromarray(np.full((20, 40), 0.5, dtype=np.float32)).save(root / "float.tiff")
    sample = parse(record(images=["float.tiff"]), root)
    with pytest.raises(SampleError, match="mode F with values beyond 16 bits"):
        sample.load()


def test_paths_of_a_loaded_sample_are_real(root):
    assert parse(record(), root).images == (Path(root / "a.png").resolve(),)
