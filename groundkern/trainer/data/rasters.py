"""Masks and heat-maps of regions: found and checked by their headers, decoded with the images.

A mask is a PNG or COCO's run lengths, a heat a grey PNG or an array (docs/data/data-format.md). All
are stretched over the whole upright image, so their sides must have its ratio; a heat may also be
square, as a model's grid of patches is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from groundkern.hf.data.example import Region
from groundkern.hf.data.video import RasterTrack
from groundkern.rasters import Raster
from groundkern.trainer.data.arrays import SUFFIXES, read_header, read_heat, scaled
from groundkern.trainer.data.images import (
    SampleError,
    confined,
    image_format,
    image_size,
    opened,
    wrong,
)
from groundkern.trainer.data.run_lengths import decoded, read_counts, size_of_runs

_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_STEP = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey of 2 and 4 bits
_VOID, _VOIDS_COLOUR = 255, [224, 224, 192]  # what VOC leaves open, in its palette

# Decoded already, since regions often share a label image: its numbers, and the one that is void.
Pictures = dict[Path, tuple[NDArray, int | None]]


@dataclass(frozen=True)
class RasterField:
    """The field of a record that names a raster, and what the raster has to cover.

    Args:
        picture: (width, height) of the upright image that it covers.
        root: the folder that paths start from.
        max_pixels: width x height that a raster may have.
        where, field: what starts an error message.
        timed: whether it is of a video, whose heats may change.
    """

    picture: tuple[int, int]
    root: Path
    max_pixels: int
    where: str
    field: str
    timed: bool = False

    def wrong(self, wanted: str, got: object) -> SampleError:
        """An error about it."""
        return wrong(self.where, self.field, wanted, got)

    def fits(self, size: tuple[int, int], what: str, *, square: bool) -> None:
        """Refuse sides (width, height) that are not the image's, but for a pixel's rounding."""
        (w, h), (width, height) = size, self.picture
        smaller = abs(w / width - h / height) <= 1 / width + 1 / height
        larger = abs(width / w - height / h) <= 1 / w + 1 / h
        if not (smaller or larger or (square and w == h)):
            wanted = f"a {what} of the ratio of its image, {width} x {height}"
            raise self.wrong(wanted + " (or a square one)" * square, f"{w} x {h}")


@dataclass(frozen=True)
class MaskFile:
    """A PNG; inside is `value`, or if that is None whatever is not 0 and not void."""

    path: Path
    value: int | None
    place: RasterField

    def load(self, pictures: Pictures) -> Raster:
        """Raises `SampleError` if it cannot be decoded, or if nothing is inside."""
        if self.path not in pictures:
            pictures[self.path] = _pixels(self.path, self.place)
        pixels, void = pictures[self.path]
        what = f"of the value {self.value}"
        if self.value is not None:
            inside = pixels == self.value
        elif void is None:
            inside, what = pixels != 0, "that is not 0"
        else:
            inside, what = (pixels != 0) & (pixels != void), f"that is not 0 or {void}, VOC's void"
        if not inside.any():
            raise self.place.wrong(f"a mask with a pixel {what}", f"none in {self.path.name!r}")
        return _raster(inside)


@dataclass(frozen=True)
class Runs:
    """Run lengths, as the bytes of int64."""

    height: int
    width: int
    runs: bytes

    def load(self, pictures: Pictures) -> Raster:
        """The mask."""
        runs = np.frombuffer(self.runs, np.int64)
        return _raster(decoded(runs, self.height, self.width))


@dataclass(frozen=True)
class HeatFile:
    """A grey PNG, or an array whose shape its header says."""

    path: Path
    place: RasterField
    shape: tuple[int, ...] | None = None

    def load(self, pictures: Pictures) -> Raster:
        """Raises `SampleError` if it cannot be decoded, or holds what is no heat."""
        if self.shape is not None:
            return _raster(read_heat(self.path, self.place.wrong, self.shape))
        values, _ = _pixels(self.path, self.place, grey=True)
        return _raster(scaled(values, self.place.wrong, self.path.name))


@dataclass(frozen=True)
class HeatTrack:
    """An array with a heat for each of some times of a video."""

    path: Path
    place: RasterField
    shape: tuple[int, ...]
    times: tuple[float, ...]

    def load(self, pictures: Pictures) -> RasterTrack:
        """Raises `SampleError` if it cannot be read, or holds what is no heat."""
        values = read_heat(self.path, self.place.wrong, self.shape)
        rasters = (_raster(each, peak=1.0) if each.any() else None for each in values)
        return tuple(zip(self.times, rasters, strict=True))


Stored = MaskFile | Runs | HeatFile | HeatTrack


class Record(Protocol):
    """What a region's record says of its raster."""

    mask: Any
    mask_value: int | None
    heat: str | None


def find_rasters(
    records: Sequence[Record],
    sizes: Sequence[tuple[int, int]],
    timed: Sequence[bool],
    *,
    root: Path,
    max_pixels: int,
    where: str,
) -> tuple[tuple[int, Stored], ...]:
    """The masks and heats of a sample, whose headers or run lengths are right.

    Args:
        records: of regions.
        sizes: (width, height) of the upright image, or of the video's frames, of each region.
        timed: whether each is of a video.
        root: the folder that paths start from and may not leave.
        max_pixels: width x height that a raster may have.
        where: what starts an error message.

    Returns:
        (index of the region, where its raster is) of each that has one.

    Raises:
        SampleError: not found, another format, too many pixels, another ratio than its image, a
            mask with nothing inside, or a `mask_value` without a label image.
    """
    found: list[tuple[int, Stored]] = []
    for index, (record, size, moves) in enumerate(zip(records, sizes, timed, strict=True)):
        name = f"regions[{index}]"
        if record.mask_value is not None and record.mask is None:
            raise wrong(where, f"{name}.mask_value", "a label image as `mask`", "none")
        if record.mask is not None:
            place = RasterField(size, root, max_pixels, where, f"{name}.mask")
            found.append((index, find_mask(record.mask, record.mask_value, place)))
        if record.heat is not None:
            place = RasterField(size, root, max_pixels, where, f"{name}.heat", moves)
            found.append((index, find_heat(record.heat, place)))
    return tuple(found)


def find_mask(mask: Any, value: int | None, place: RasterField) -> MaskFile | Runs:
    """A mask whose header, or whose run lengths, are right.

    Args:
        mask: of a record: a path, or run lengths.
        value: of a label image's pixels that are inside; None: all but 0.
        place: what it covers.

    Raises:
        SampleError: as `find_rasters`.
    """
    if isinstance(mask, str):
        if mask.endswith(SUFFIXES):
            raise place.wrong("a PNG or run lengths (an array is a `heat`)", repr(mask)[:80])
        path, size = _png(mask, place)
        place.fits(size, "mask", square=False)
        return MaskFile(path, value, place)
    if value is not None:
        raise place.wrong("a label image for `mask_value`", "run lengths")
    height, width = size_of_runs(mask, where=place.where, field=place.field)
    if height * width > place.max_pixels:
        raise place.wrong(f"at most {place.max_pixels} pixels", f"{width} x {height}")
    place.fits((width, height), "mask", square=False)
    field = f"{place.field}.counts"
    runs = read_counts(mask["counts"], height * width, where=place.where, field=field)
    if not runs[1::2].any():
        raise place.wrong("a mask with a pixel inside", "none")
    return Runs(height, width, runs.tobytes())


def find_heat(path: str, place: RasterField) -> HeatFile | HeatTrack:
    """A heat whose header is right.

    Raises:
        SampleError: as `find_rasters`.
    """
    if not path.endswith(SUFFIXES):
        found, size = _png(path, place)
        place.fits(size, "heat", square=True)
        return HeatFile(found, place)
    found = confined(path, place.root, where=place.where, field=place.field)
    header = read_header(found, place.wrong, most=place.max_pixels, timed=place.timed)
    place.fits(header.shape[:-3:-1], "heat", square=True)
    if header.times is None:
        return HeatFile(found, place, header.shape)
    return HeatTrack(found, place, header.shape, header.times)


def with_rasters(
    regions: Sequence[Region], rasters: Sequence[tuple[int, Stored]]
) -> tuple[Region, ...]:
    """Decode rasters and put each into its region.

    Args:
        regions: of a sample.
        rasters: (index of the region, where its raster is).

    Raises:
        SampleError: one that cannot be decoded, or that has nothing inside.
    """
    made, pictures = list(regions), {}
    for index, stored in rasters:
        found = stored.load(pictures)
        place = {"rasters": (found,)} if isinstance(found, Raster) else {"raster_track": found}
        made[index] = replace(made[index], **place)
    return tuple(made)


def _raster(values: NDArray, peak: float | None = None) -> Raster:
    import torch  # here: a data file is checked without

    return Raster(torch.from_numpy(values), peak)


def _png(path: str, place: RasterField) -> tuple[Path, tuple[int, int]]:
    """The file and its (width, height), upright."""
    found = confined(path, place.root, where=place.where, field=place.field)
    kind = image_format(found, where=place.where, field=place.field)
    if kind != "PNG":
        raise place.wrong("a PNG", f"{kind} in {found.name!r}")
    limit = {"max_pixels": place.max_pixels, "where": place.where, "field": place.field}
    return found, image_size(found, **limit)


def _pixels(path: Path, place: RasterField, *, grey: bool = False) -> tuple[NDArray, int | None]:
    """The numbers of a PNG's pixels, upright: [height, width]; the one that is void, if any."""
    try:
        with opened(path, path.name, where=place.where, field=place.field) as image:
            if grey and image.mode not in _GREY:
                raise place.wrong("a grey PNG", f"mode {image.mode} in {path.name!r}")
            step = _STEP.get(str(image.tile[0][3]), 1) if image.tile else 1
            image.load()
            palette = image.getpalette() if image.mode == "P" else None
            void = _VOID if palette and palette[3 * _VOID :] == _VOIDS_COLOUR else None
            image = ImageOps.exif_transpose(image)
            if image.mode in ("LA", "RGBA", "PA"):
                if image.getextrema()[-1][0] < 255:
                    wanted = "an image without transparent pixels, which may mean in or out"
                    raise place.wrong(wanted, f"some in {path.name!r}")
                image = image.convert("L" if image.mode == "LA" else "RGB")
            pixels = np.asarray(image)
            if pixels.ndim == 3:  # red + 256 green + 65536 blue, as COCO's panoptic ids
                pixels = np.dot(pixels, np.array([1, 1 << 8, 1 << 16], np.uint32))
            return pixels // step if step > 1 else pixels, void
    except SampleError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise place.wrong("an image that can be decoded", f"{path.name!r} ({error})") from None
