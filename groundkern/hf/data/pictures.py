"""From whatever Pillow opened to upright 8-bit RGB, the same for every family's processor.

Left to themselves, image processors show the stored pixels of a photograph that says "turn me",
uncover what lies under transparent pixels, and make 16-bit grey white.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from operator import is_
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from groundkern.hf.data.example import GroundedExample
from groundkern.hf.data.video import Video
from groundkern.messages import fail, require

STRIP = 2**20  # pixels that are converted at a time
ORIENTATION = 0x0112  # EXIF tag; 2 to 8 ask for a turn or a mirror image
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags
_PNG = b"\x89PNG\r\n\x1a\n"
_SAYS_ORIENTATION = (b"eXIf", b"iTXt")
_XMP_ORIENTATION = re.compile(
    rb'XML:com\.adobe\.xmp\0.*?tiff:Orientation(?:="|>)([0-9])', re.DOTALL
)
_LONGEST_CHUNK = 2**20  # bytes of a PNG chunk that are looked at
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error)


def with_rgb_images(example: GroundedExample, name: str) -> GroundedExample:
    """The example with images and frames of videos that processors take as they are.

    Args:
        example: images as Pillow opened or made them.
        name: what error messages call it.

    Returns:
        The same example if all of them are upright 8-bit RGB already.

    Raises:
        ValueError: see `upright_rgb`; the message names the example and the image or frame.
    """
    images = _upright(example.images, f"{name}: images")
    videos = tuple(
        _with_frames(video, f"{name}: videos[{index}]")
        for index, video in enumerate(example.videos)
    )
    same = all(map(is_, (*images, *videos), (*example.images, *example.videos)))
    return example if same else replace(example, images=images, videos=videos)


def _with_frames(video: Video, where: str) -> Video:
    frames = _upright(video.frames, f"{where}.frames")
    return video if all(map(is_, frames, video.frames)) else replace(video, frames=frames)


def _upright(images: Sequence[Any], where: str) -> tuple[Image.Image, ...]:
    return tuple(upright_rgb(image, f"{where}[{index}]") for index, image in enumerate(images))


def upright_rgb(image: Any, where: str) -> Image.Image:
    """An image in 8-bit RGB, turned as its EXIF data asks, transparent pixels over white.

    An image as it was opened is turned. One that was derived from it (`convert`, `resize`,
    `rotate`) and kept the request is refused: nothing tells whether its pixels are turned already.
    Of several frames it is the current one.

    Args:
        image: a PIL image of any mode whose range is known.
        where: what error messages call it.

    Returns:
        The image itself if it is upright 8-bit RGB.

    Raises:
        ValueError: not a PIL image, one that cannot be decoded, without pixels, with values beyond
            16 bits, or with a request to turn that may have been met.
    """
    if not isinstance(image, Image.Image):
        fail(where, "a PIL image", f"{type(image).__module__}.{type(image).__qualname__}")
    try:
        image.load()  # TIFF is turned by Pillow here, and then no longer asks for it
        orientation = image.getexif().get(ORIENTATION, 1)
    except _UNREADABLE as error:
        fail(where, "an image that can be decoded", f"its error: {error}")
    require(
        min(image.size) > 0, where, "an image with pixels", "one of {} x {}".format(*image.size)
    )
    if orientation in range(2, 9):
        if not isinstance(image, ImageFile.ImageFile):
            wanted = (
                "an image without an EXIF orientation, by which it may have been turned already "
                "(PIL.ImageOps.exif_transpose turns an opened one and drops it)"
            )
            fail(where, wanted, f"orientation {orientation}")
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    try:
        return to_rgb(image)
    except ValueError as error:
        fail(where, "an image that has an 8-bit RGB form", error)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that was opened and not decoded, once it is turned as it asks.

    Args:
        image: of `PIL.Image.open`; stays undecoded. Open it anew to decode it: Pillow keeps what it
            has read of the EXIF data, which in a PNG may go on behind the pixels.
    """
    width, height = image.size
    file: Any = image  # of a class of its own for each format
    if image.format == "TIFF":  # some versions of Pillow turn its `size` on opening, some do not
        width, height = file.tag_v2[_TIFF_WIDTH], file.tag_v2[_TIFF_HEIGHT]
    # not PngImageFile's own getexif, which would decode the pixels
    orientation = Image.Image.getexif(image).get(ORIENTATION)
    if orientation is None and image.format == "PNG":
        orientation = _behind_the_pixels(file.fp)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _behind_the_pixels(file: IO[bytes]) -> int | None:
    """The orientation that a PNG names after its pixels, where Pillow's header does not reach."""
    before, found = file.tell(), None
    try:
        file.seek(len(_PNG))
        while found is None and len(head := file.read(8)) == 8:
            size, name = struct.unpack(">I4s", head)
            data = file.read(size) if name in _SAYS_ORIENTATION and size < _LONGEST_CHUNK else b""
            file.seek(size - len(data) + 4, 1)
            if name == b"eXIf":
                exif = Image.Exif()
                exif.load(data)
                found = exif.get(ORIENTATION)
            elif data.startswith(b"XML:com.adobe.xmp\0") and (
                said := _XMP_ORIENTATION.search(data)
            ):
                found = int(said[1])
    except _UNREADABLE:
        return None  # decoding will say what is wrong with it
    finally:
        file.seek(before)
    return found


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB with transparent pixels over white; 16-bit grey keeps its upper bits.

    Args:
        image: decoded and upright.

    Returns:
        The image itself, or a new one, made with no further copy of the whole.

    Raises:
        ValueError: values whose range is not known.
    """
    grey = image.mode.startswith("I")  # 16-bit grey comes as I;16 or I
    if image.mode == "F":
        raise ValueError("mode F with values beyond 16 bits")
    if not grey and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        rgb.paste(_upper_bits(strip) if grey else _over_white(strip), (0, top))
    return rgb


def _upper_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"mode {image.mode} with values beyond 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")
