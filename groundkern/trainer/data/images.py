"""Images of a data set: paths that stay in the data root, header checks, safe conversion to RGB."""

from __future__ import annotations

import os
import stat
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from groundkern.hf.data.pictures import to_rgb, upright_size
from groundkern.trainer.data.file_kinds import ADVICE, HEAD, kind_of
from groundkern.trainer.wording import cut

MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # image processors refuse longer strips
PER_PIXEL = 12  # bytes that a pixel takes at most while it is decoded, as it is in most formats
DECODERS = {
    "JPEG2000": 25,
    "WEBP": 17,
    "AVIF": 16,
    "HEIF": 13,
}  # take more; measured with Pillow 13
SETTLED = 2 * 10**9  # nanoseconds after which a file's time says whether it was written again


class SampleError(ValueError):
    """A sample that cannot be used: the message names its line, the field, what was wanted, what
    came.

    A DataLoader makes an error of a worker process anew, of a text that has the worker's traceback
    before the message: the message alone is kept.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught ") and "DataLoader worker process" in message:
            message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
        super().__init__(cut(message))


class DataChanged(SampleError):
    """The data file is not what was checked when the run started: never skipped."""


def wrong(where: str, field: str, wanted: str, got: object) -> SampleError:
    """The error to raise, in the one message form of the trainer's data."""
    return SampleError(f"{where}: `{field}`: expected {wanted}, got {got}")


def confined(path: str, root: Path, *, where: str, field: str, folder_too: bool = False) -> Path:
    """The real path of an image, checked to be a file inside the data root.

    Args:
        path: relative to `root`; symbolic links may not lead out of it.
        root: the data root.
        where, field: what starts the error message.
        folder_too: of a video, which may be a folder.

    Raises:
        SampleError: absolute, leaves the root, or is no file.
    """
    if plain := _plain_file(path, root):
        return plain
    if not path or Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise wrong(where, field, "a relative path inside the data root", repr(path))
    try:
        real = (root / path).resolve()
        if not real.is_relative_to(root.resolve()):
            raise wrong(where, field, f"a path inside {root}", f"{path!r}, a link to {real}")
        found = real.is_file() or (folder_too and real.is_dir())
    except (OSError, RuntimeError) as error:  # name too long, links in a circle, not permitted
        raise wrong(where, field, "a readable file", f"{path!r} ({error})") from None
    if not found:
        what = "a video file or a folder of frames" if folder_too else "an image file"
        raise wrong(where, field, f"{what} under {root}", f"{path!r}, which is not there")
    return real


def _plain_file(path: str, root: Path) -> Path | None:
    """The real path of a file that is below the root and not behind a link, the usual case, with
    as little work as that takes; None in all other cases, good or bad."""
    parts = path.split("/")
    if os.sep != "/" or "\0" in path or not {"", ".", ".."}.isdisjoint(parts):
        return None
    found = _real_root(os.path.abspath(root))
    try:
        for part in parts:
            found = f"{found}/{part}"
            mode = os.lstat(found).st_mode
            if stat.S_ISLNK(mode):
                return None
    except (OSError, ValueError):
        return None
    return Path(found) if stat.S_ISREG(mode) else None


@lru_cache(maxsize=16)
def _real_root(root: str) -> str:
    return os.path.realpath(root).removesuffix("/")


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS, where: str, field: str) -> tuple:
    """Width and height in pixels after EXIF rotation, read from the header alone.

    Args:
        path: from `confined`.
        max_pixels: width x height that an image may have.
        where, field: what starts the error message.

    Raises:
        SampleError: not an image, more than `max_pixels` or than 12 bytes for each of these while
            it is decoded, or a strip 200 times as long as wide.
    """
    size, kind = _header(path, where, field)
    check_size(size, kind, path.name, max_pixels=max_pixels, where=where, field=field)
    return size


def check_size(
    size: tuple[int, int],
    kind: str | None,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    where: str,
    field: str,
) -> None:
    """Refuses an image by its header if it is too large or too narrow.

    Args:
        size: width and height.
        kind: Pillow's name of the format.
        name: of the file.
        max_pixels, where, field: see `image_size`.

    Raises:
        SampleError: see `image_size`.
    """
    width, height = size
    if width * height > max_pixels:
        raise wrong(where, field, f"at most {max_pixels} pixels", f"{width} x {height} in {name!r}")
    wanted, needed = PER_PIXEL * max_pixels, DECODERS.get(kind, PER_PIXEL) * width * height
    if needed > wanted:
        got = f"{needed} for the {kind} of {width} x {height} in {name!r}"
        raise wrong(where, field, f"at most {wanted} bytes while it is decoded", got)
    if max(width, height) > MAX_ASPECT * min(width, height):
        wanted = f"a longer side of at most {MAX_ASPECT} times the shorter"
        raise wrong(where, field, wanted, f"{width} x {height} in {name!r}")


def image_format(path: Path, *, where: str, field: str) -> str | None:
    """The format of an image file by its header, in Pillow's words.

    Raises:
        SampleError: not an image in a known format.
    """
    return _header(path, where, field)[1]


def _header(path: Path, where: str, field: str) -> tuple[tuple[int, int], str | None]:
    """Width and height after EXIF rotation, and the format."""
    try:
        found = path.stat()
    except OSError:
        known = None
    else:
        known = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
        if time.time_ns() - found.st_mtime_ns < SETTLED:  # another write could leave the same time
            known = None
    if known in _headers:
        return _headers[known]
    with opened(path, path.name, where=where, field=field) as image:
        found = header_size(image, path.name, where, field), image.format
    if known is not None:
        if len(_headers) >= 1024:
            _headers.clear()
        _headers[known] = found
    return found


_headers: dict[
    tuple, tuple[tuple[int, int], str | None]
] = {}  # several samples often share an image


def load_rgb(path: Path, size: tuple[int, int], *, where: str, field: str) -> Image.Image:
    """Decode an image to 8-bit RGB, rotated as its EXIF data asks, transparent pixels over white.

    Args:
        path: from `confined`.
        size: from `image_size`, by which boxes in pixels were divided.
        where, field: what starts the error message.

    Raises:
        SampleError: corrupt, truncated, of a depth that has no known range, or of another size.
    """
    with opened(path, path.name, where=where, field=field) as image:
        rgb = decoded(image, path.name, where=where, field=field)
    if rgb.size != size:
        raise wrong(where, field, f"{size[0]} x {size[1]} pixels", f"{rgb.size[0]} x {rgb.size[1]}")
    return rgb


def decoded(image: Image.Image, name: str, *, where: str, field: str) -> Image.Image:
    """8-bit RGB of an image that was opened; see `load_rgb`.

    Args:
        image: of `opened`, its size checked.
        name: of the file.
        where, field: what starts the error message.

    Raises:
        SampleError: corrupt, truncated, or of a depth that has no known range.
    """
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        got = f"{name!r} ({error})"
        raise wrong(where, field, "an image that can be decoded", got) from None


def opened(file: Path | IO[bytes], name: str, *, where: str, field: str) -> Image.Image:
    """An image whose header was read and nothing else; HEIC too if pillow-heif is installed.

    Args:
        file: path, or a seekable file of bytes.
        name: of the file.
        where, field: what starts the error message.

    Raises:
        SampleError: not an image that can be opened; says what it is and what it needs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise wrong(where, field, "an image of ordinary size", f"{name!r} ({error})") from None
    except UnidentifiedImageError:
        kind = kind_of(_head(file))
        if kind == "HEIC" and _opens_heic():
            return opened(file, name, where=where, field=field)
        got = f"{name!r}, {ADVICE.get(kind, 'which is not one')}"
        raise wrong(where, field, "an image in a known format", got) from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise wrong(where, field, "a readable image", f"{name!r} ({error})") from None
    if image.format == "EPS":  # a program that Pillow would hand to Ghostscript, if it is there
        image.close()
        raise wrong(where, field, "an image in a known format", f"{name!r}, {ADVICE['EPS']}")
    return image


def header_size(image: Image.Image, name: str, where: str, field: str) -> tuple[int, int]:
    """`groundkern.hf.data.pictures.upright_size` of an image that may be damaged.

    Raises:
        SampleError: its EXIF data cannot be read.
    """
    try:
        return upright_size(image)
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise wrong(where, field, "a readable image", f"{name!r} ({error})") from None


def _head(file: Path | IO[bytes]) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return stream.read(HEAD)
    file.seek(0)
    head = file.read(HEAD)
    file.seek(0)
    return head


def _opens_heic() -> bool:
    """Lets Pillow open HEIC from now on; False if that is not installed or was so already."""
    if "HEIF" in Image.OPEN:
        return False
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True
