"""What a sample's target map will be on a grid of visual tokens, as numbers and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from groundkern.rasters import Raster
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import Sample, parse_sample

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 280  # pixels of one sample in a preview
_HEAT = np.array([235.0, 60.0, 20.0])
_KINDS = {"box": "boxes", "points": "points", "polygon": "polygons", "polyline": "polylines"}


@dataclass(frozen=True)
class Grid:
    """A grid of visual tokens that an image is stretched over, and a kind of target map.

    Args:
        height, width: in visual tokens.
        kind: see `groundkern.maps.target_map`.
    """

    height: int
    width: int
    kind: str

    @classmethod
    def of(cls, text: str | None, kind: str) -> Grid | None:
        """The grid that `--grid` names.

        Raises:
            ConfigError: not HEIGHTxWIDTH.
        """
        if text is None:
            return None
        height, _, width = text.partition("x")
        plain = all(side.isdecimal() and len(side) < 10 and int(side) for side in (height, width))
        if not plain:
            raise ConfigError(f"maps: `--grid`: expected HEIGHTxWIDTH, such as 16x16, got {text!r}")
        if int(height) * int(width) > 1 << 20:
            raise ConfigError(f"maps: `--grid`: expected at most {1 << 20} tokens, got {text}")
        return cls(int(height), int(width), kind)

    def target(self, shapes: Mapping[str, list]) -> Tensor:
        """The target map of shapes in fractions of the image: fp32 [height * width]."""
        from groundkern import maps

        return maps.target_map(maps.patch_grid(self.height, self.width), kind=self.kind, **shapes)

    def counts(
        self, record: Mapping, size: tuple[int, int], rasters: Sequence[Raster] = ()
    ) -> dict[str, float]:
        """What `show_maps` adds up, of a record whose places are pixel edges of one image; its
        masks and heats are `rasters`."""
        shapes: dict[str, list] = {"rasters": list(rasters)} if rasters else {}
        for region in record["regions"]:
            for name, kind in _KINDS.items():
                if name == "points" and "spread" in region:
                    shapes.setdefault("bells", []).extend(_bells(region, size))
                elif name in region:
                    shapes.setdefault(kind, []).extend(_fractions(region[name], name, size))
        if not shapes:
            return {}
        from groundkern import maps

        rects = maps.patch_grid(self.height, self.width)
        on = maps.inside(rects, **shapes)
        mass = float(self.target(shapes)[on].sum())
        tokens = int(on.sum())
        empty = {"maps": 1, "maps_empty": 1}
        return {"maps": 1, "map_tokens": tokens, "map_mass": mass} if tokens else empty


def _fractions(place: list, name: str, size: tuple[int, int]) -> list:
    """A record's place as the list of shapes that `groundkern.maps` wants for its kind."""
    if name == "box":
        return [[value / size[i % 2] for i, value in enumerate(place)]]
    points = [[x / size[0], y / size[1]] for x, y in place]
    return points if name == "points" else [points]


def _bells(region: Mapping, size: tuple[int, int]) -> list:
    """The points of a record with a spread, as `groundkern.maps` wants them."""
    spread = region["spread"]
    across, down = spread if isinstance(spread, list) else (spread, spread)
    points = _fractions(region["points"], "points", size)
    return [[x, y, across / size[0], down / size[1]] for x, y in points]


def show_maps(counts: Mapping[str, float]) -> None:
    """Prints how large the target maps' targets are and how much of the mass is on them."""
    found = counts.get("maps", 0) - counts.get("maps_empty", 0)
    if found:
        tokens, mass = counts["map_tokens"] / found, counts["map_mass"] / found
        print(f"{tokens:>12.1f}  tokens on the target, on average, with {mass:.0%} of the map")


def preview(path: Path, root: Path, grid: Grid, *, count: int) -> Path:
    """Draws the first `count` samples with a place under their target maps; returns the PNG."""
    tiles = []
    with path.open("rb") as file:
        samples = (parse_sample(json.loads(line), root=root, where=path.name) for line in file)
        for sample in islice((s for s in samples if s.regions), count):
            tiles.append(_tile(sample, grid))
    across = max(1, math.isqrt(len(tiles) - 1) + 1 if tiles else 1)
    down = max(1, math.ceil(len(tiles) / across))
    sheet = Image.new("RGB", (across * (_TILE + 8), down * (_TILE + 28)), (40, 40, 40))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % across * (_TILE + 8) + 4, i // across * (_TILE + 28) + 4))
    picture = path.with_suffix(".preview.png")
    sheet.save(picture)
    return picture


def _tile(sample: Sample, grid: Grid) -> Image.Image:
    """One sample: the image of its first region, pale, with the map over it and the answer."""
    example = sample.load()
    number = sample.regions[0].image
    regions = [region for region in example.regions if region.image == number]
    kinds = (*_KINDS.values(), "bells", "rasters")
    shapes = {k: [s for region in regions for s in getattr(region, k)] for k in kinds}
    target = grid.target(shapes).reshape(grid.height, grid.width)
    heat = Image.fromarray((target / target.max().clamp_min(1e-30) * 255).byte().numpy())
    image = example.images[number]
    scale = _TILE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize(size)).astype(float)
    alpha = np.asarray(heat.resize(size, Image.NEAREST))[..., None] / 255 * 0.6
    mixed = (110 + pixels * 0.57) * (1 - alpha) + _HEAT * alpha
    tile = Image.new("RGB", (_TILE, _TILE + 20), (40, 40, 40))
    tile.paste(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)), (0, 0))
    answer = sample.messages[sample.regions[0].turn]["content"]
    text = answer if isinstance(answer, str) else " ".join(p.get("text", "") for p in answer)
    caption = text.encode("latin-1", "replace").decode("latin-1")[:44]
    ImageDraw.Draw(tile).text((2, _TILE + 4), caption, fill="white")
    return tile
