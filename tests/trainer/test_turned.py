"""Every format that says how it is turned, x every turn: the size by the header is that of pixels.

And the same wherever orientation is read: a file, bytes inside a table, an opened PIL image.
"""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, features

from groundkern.hf.data.pictures import ORIENTATION, upright_rgb
from groundkern.trainer.data.images import SampleError, image_size, load_rgb, opened
from groundkern.trainer.prepare.adapt.common import Options, embedded
from groundkern.trainer.prepare.sources import Item
from tests.hf.test_pictures import TURNS

SIZE = (48, 80)  # as people see it
NO_TURN = {1: None, **TURNS}
WHERE = {"where": "x:1", "field": "images[0]"}


def seen() -> Image.Image:
    """Four colours, one in each quarter."""
    image = Image.new("RGB", SIZE, (255, 0, 0))
    width, height = SIZE
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste((255, 255, 255), (width // 2, height // 2, width, height))
    return image


def stored(turn: int) -> tuple[Image.Image, Image.Exif]:
    """Pixels as a camera stores them, and what it says of them."""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return seen() if turn == 1 else seen().transpose(NO_TURN[turn]), exif


def saved(kind: str, turn: int) -> bytes:
    image, exif = stored(turn)
    buffer = io.BytesIO()
    if kind == "PNG, XMP":
        return xmp_png(image, turn, late=False)
    if kind == "PNG, late XMP":
        return xmp_png(image, turn, late=True)
    if kind == "PNG, late eXIf":
        image.save(buffer, "PNG")
        return with_chunk(buffer.getvalue(), b"eXIf", exif.tobytes()[6:], late=True)
    if kind == "TIFF, XMP":
        image.save(buffer, "TIFF", tiffinfo={700: xmp(turn)})
        return buffer.getvalue()
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
        image.save(buffer, "HEIF", exif=exif.tobytes(), quality=100)
        return buffer.getvalue()
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(kind, {})
    image.save(buffer, kind, exif=exif, **lossless)
    return buffer.getvalue()


def xmp(turn: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{turn}"/></x:xmpmeta>'.encode()


def xmp_png(image: Image.Image, turn: int, *, late: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = b"XML:com.adobe.xmp" + bytes(5) + xmp(turn)
    return with_chunk(buffer.getvalue(), b"iTXt", data, late=late)


def with_chunk(png: bytes, name: bytes, data: bytes, *, late: bool) -> bytes:
    """A PNG with one more chunk, before its pixels or after them."""
    at = png.index(b"IEND" if late else b"IDAT") - 4
    checked = name + data
    chunk = struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
    return png[:at] + chunk + png[at:]


KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "MPO")
ODD = ("PNG, XMP", "PNG, late eXIf", "PNG, late XMP", "TIFF, XMP")


@pytest.mark.parametrize("turn", NO_TURN)
@pytest.mark.parametrize("kind", KINDS + ODD)
def test_size_and_pixels_are_those_of_the_turned_image(tmp_path, kind, turn):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "a.img"
    path.write_bytes(saved(kind, turn))
    size = image_size(path, **WHERE)
    assert size == SIZE
    pixels = np.asarray(load_rgb(path, size, **WHERE)).astype(int)
    assert np.abs(pixels - np.asarray(seen())).mean() < 8
    with opened(path, "a.img", **WHERE) as image:
        assert np.abs(np.asarray(upright_rgb(image, "x")).astype(int) - pixels).max() == 0


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "PNG, late eXIf"])
def test_bytes_inside_a_table(tmp_path, kind, turn):
    row = {"image": {"bytes": saved(kind, turn)}}
    found = embedded(row, Item(3, "rows[3]", row), Options(tmp_path, folder="made"))
    assert found.size == SIZE
    (name,) = found.files
    assert name.startswith("made/00000003.")


@pytest.mark.parametrize("late", [b"eXIf", b"iTXt"])
def test_a_png_that_lies_behind_its_pixels_is_refused_or_read(tmp_path, late):
    """Chunks cut short, of absurd length, or of no meaning."""
    image, _ = stored(1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    whole = with_chunk(buffer.getvalue(), late, b"XML:com.adobe.xmp" + bytes(40), late=True)
    at = whole.index(late)
    huge = whole[: at - 4] + b"\xff\xff\xff\xff" + whole[at:]
    for data in (whole, huge, whole[: at + 4], whole[: at - 2]):
        path = tmp_path / "a.png"
        path.write_bytes(data)
        assert image_size(path, **WHERE) == SIZE
        with suppress(SampleError):
            assert load_rgb(path, SIZE, **WHERE).size == SIZE
