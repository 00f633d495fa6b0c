"""Item 13: whatever Pillow opened becomes upright RGB, or is refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from groundkern.hf import GroundedExample, Word
from groundkern.hf.data.pictures import ORIENTATION, upright_rgb
from tests.hf.collating import live, make_collator, make_example, make_region

SIZE = (84, 140)  # as seen: 5 rows of 3 tokens in the tiny Qwen
TURNS = {  # what makes the stored image of the seen one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def seen():
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(SIZE[1])[:, None]
    pixels[:, :, 1] = np.arange(SIZE[0])[None] * 2
    return Image.fromarray(pixels)


def opened(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def stored(orientation, kind="png", **options):
    """The file that a camera writes: turned pixels, and how to turn them back."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return opened(seen().transpose(TURNS[orientation]), kind, exif=exif, **options)


def sample(image):
    answer = "The red patch."
    places = [make_region(answer, "red", boxes=((0, 0, 0.3, 0.2),))]
    words = (Word("row", (0.7, 0.8, 1, 1), 0),)
    return make_example(answer, places, words=words, images=(image,), name="x")


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_opened_image_is_turned_as_its_exif_data_asks(orientation, kind):
    image = stored(orientation, kind)
    collator = make_collator()
    batch, wanted = collator([sample(image)]), make_collator()([sample(seen())])
    assert batch.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(batch[name], tensor), name
    assert batch["image_grid_thw"].tolist() == [[1, 10, 6]]
    assert live(batch["gk_word_position"][0]) == live(batch["gk_map_columns"][0])[-1:]


def test_a_photograph_is_turned():
    turned = upright_rgb(stored(6, "jpeg", quality=95), "x")
    assert turned.size == SIZE
    difference = np.abs(np.asarray(turned).astype(int) - np.asarray(seen()))
    assert difference.mean() < 3


@pytest.mark.parametrize("derive", ["convert", "copy", "rotate", "resize"])
def test_a_derived_image_that_still_asks_to_be_turned_is_refused(derive):
    """Was it turned by hand, or not at all? Both come with the same request."""
    image = stored(6)
    made = {
        "convert": lambda: image.convert("RGB"),
        "copy": image.copy,
        "rotate": lambda: image.transpose(Image.Transpose.ROTATE_270),
        "resize": lambda: image.resize((70, 42)),
    }[derive]()
    with pytest.raises(
        ValueError, match=r"`x: images\[0\]`: .*EXIF orientation.*, got orientation 6"
    ):
        make_collator()([sample(made)])
    mended = ImageOps.exif_transpose(stored(6)).convert("RGB")
    assert make_collator()([sample(mended)])["image_grid_thw"].tolist() == [[1, 10, 6]]


def test_orientations_that_ask_for_nothing_are_fine():
    for value in (1, 0, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        image = opened(seen(), exif=exif)
        assert upright_rgb(image, "x") is image


def test_an_image_that_is_rgb_already_is_the_same_object():
    image = seen()
    assert upright_rgb(image, "x") is image
    example = sample(image)
    make_collator()([example])
    assert example.images[0] is image


def _grey_16():
    return Image.fromarray(np.full((20, 40), 128 * 257, dtype=np.uint16))


def _clear_palette():
    image = Image.new("P", (40, 20), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (_grey_16, 128),
        (lambda: Image.new("I", (40, 20), 128 * 257), 128),
        (lambda: Image.new("RGB", (40, 20), (128,) * 3).quantize(4), 128),
        (lambda: Image.new("L", (40, 20), 128), 128),
        (lambda: Image.new("1", (40, 20), 1), 255),
        (lambda: Image.new("RGBA", (40, 20), (0, 0, 0, 0)), 255),
        (lambda: Image.new("LA", (40, 20), (0, 128)), 127),
        (lambda: Image.new("CMYK", (40, 20), (0, 0, 0, 127)), 128),
        (lambda: Image.new("YCbCr", (40, 20), (128, 128, 128)), 128),
        (_clear_palette, 255),
    ],
)
@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_every_mode_means_the_same_to_every_family(make, wanted, family):
    batch = make_collator(family)([make_example(images=(make(),))])
    plain = make_collator(family)(
        [make_example(images=(Image.new("RGB", (40, 20), (wanted,) * 3),))]
    )
    torch.testing.assert_close(batch["pixel_values"], plain["pixel_values"], rtol=0, atol=0.02)


def test_of_several_frames_it_is_the_current_one():
    frames = [Image.new("RGB", (56, 56), (value,) * 3) for value in (10, 200)]
    image = opened(frames[0], "tiff", save_all=True, append_images=frames[1:])
    assert image.n_frames == 2
    assert upright_rgb(image, "x").getpixel((0, 0)) == (10, 10, 10)
    image.seek(1)
    assert upright_rgb(image, "x").getpixel((0, 0)) == (200, 200, 200)


def _cut():
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(data, "jpeg")
    return Image.open(io.BytesIO(data.getvalue()[: len(data.getvalue()) // 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.zeros((20, 20, 3), dtype=np.uint8), "expected a PIL image, got numpy.ndarray"),
        (lambda: torch.zeros(3, 20, 20), "expected a PIL image, got torch.Tensor"),
        (lambda: "a.png", "expected a PIL image, got builtins.str"),
        (lambda: None, "expected a PIL image"),
        (lambda: Image.new("F", (20, 20), 0.5), "an 8-bit RGB form, got mode F"),
        (lambda: Image.new("I", (20, 20), 70000), "values beyond 16 bits"),
        (lambda: Image.new("RGB", (0, 20)), "an image with pixels, got one of 0 x 20"),
        (_cut, "an image that can be decoded, got its error: image file is truncated"),
    ],
)
def test_what_is_no_image_of_known_range_is_named(make, message):
    image = make()
    messages = make_example().messages
    example = GroundedExample((image,), messages, name="data.jsonl:9")
    with pytest.raises(ValueError) as caught:
        make_collator()([make_example(), example])
    assert str(caught.value).startswith("`data.jsonl:9: images[0]`: ")
    assert message in str(caught.value)


def test_a_closed_file_is_named():
    image = stored(6)
    image.close()
    with pytest.raises(ValueError, match=r"`x: images\[0\]`"):
        make_collator()([sample(image)])
