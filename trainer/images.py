"""Images of a data set: paths that stay in the data root, header checks, safe conversion to RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # image processors refuse longer strips
ORIENTATION = 0x0112  # EXIF tag; its values 5 to 8 swap width and height


class SampleError(ValueError):
    """A sample that cannot be used: the message names its line, the field, what was wanted, what
    came."""


def wrong(where: str, field: str, wanted: str, got: object) -> SampleError:
    """The error to raise, in the one message form of the trainer's data."""
    return SampleError(f"{where}: `{field}`: expected {wanted}, got {got}")


def confined(path: str, root: Path, *, where: str, field: str) -> Path:
    """The real path of an image, checked to be a file inside the data root.

    Args:
        path: relative to `root`; symbolic links may not lead out of it.
        root: the data root.
        where, field: what starts the error message.

    Raises:
        SampleError: absolute, leaves the root, or is no file.
    """
    if not path or Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise wrong(where, field, "a relative path inside the data root", repr(path))
    try:
        real = (root / path).resolve()
        if not real.is_relative_to(root.resolve()):
            raise wrong(where, field, f"a path inside {root}", f"{path!r}, a link to {real}")
        found = real.is_file()
    except (OSError, RuntimeError) as error:  # name too long, links in a circle, not permitted
        raise wrong(where, field, "a readable file", f"{path!r} ({error})") from None
    if not found:
        raise wrong(where, field, f"an image file under {root}", f"{path!r}, which is not there")
    return real


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS, where: str, field: str) -> tuple:
    """Width and height in pixels after EXIF rotation, read from the header alone.

    Args:
        path: from `confined`.
        max_pixels: width x height that an image may have.
        where, field: what starts the error message.

    Raises:
        SampleError: not an image, more than `max_pixels`, or a strip 200 times as long as wide.
    """
    with _opened(path, where, field) as image:
        width, height = image.size
        # not PngImageFile's own getexif, which would decode the pixels
        turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
    if width * height > max_pixels:
        raise wrong(
            where, field, f"at most {max_pixels} pixels", f"{width} x {height} in {path.name!r}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        wanted = f"a longer side of at most {MAX_ASPECT} times the shorter"
        raise wrong(where, field, wanted, f"{width} x {height} in {path.name!r}")
    return (height, width) if turned else (width, height)


def load_rgb(path: Path, size: tuple[int, int], *, where: str, field: str) -> Image.Image:
    """Decode an image to 8-bit RGB, rotated as its EXIF data asks, transparent pixels over white.

    Args:
        path: from `confined`.
        size: from `image_size`, by which boxes in pixels were divided.
        where, field: what starts the error message.

    Raises:
        SampleError: corrupt, truncated, of a depth that has no known range, or of another size.
    """
    try:
        with _opened(path, where, field) as image:
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except SampleError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        got = f"{path.name!r} ({error})"
        raise wrong(where, field, "an image that can be decoded", got) from None
    if rgb.size != size:
        raise wrong(where, field, f"{size[0]} x {size[1]} pixels", f"{rgb.size[0]} x {rgb.size[1]}")
    return rgb


def _opened(path: Path, where: str, field: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except Image.DecompressionBombError as error:
        raise wrong(where, field, "an image of ordinary size", f"{path.name!r} ({error})") from None
    except UnidentifiedImageError:
        got = f"{path.name!r}, which is not one"
        raise wrong(where, field, "an image in a known format", got) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise wrong(where, field, "a readable image", f"{path.name!r} ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey comes as I;16 or I
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"mode {image.mode} with values beyond 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")
