"""Boxes and points in what a model writes, in every notation of the models that we know.

Most notations say themselves what their numbers count: `<loc0512>` is one of 1024, a `<box>` is in
thousandths. In lists (`[100, 100, 300, 300]`) and JSON nothing does; there `coord` decides, as it
does in a data file (docs/data-format.md), and the caller has to know it.

| notation | numbers | of |
|---|---|---|
| `<|box_start|>(x0,y0),(x1,y1)<|box_end|>`, `<box>(x0,y0),(x1,y1)</box>` | thousandths | Qwen-VL, Qwen2-VL |
| `<box>[[x0, y0, x1, y1]]</box>`, `<box>x0 y0 x1 y1</box>` | thousandths | InternVL, MiniCPM-V |
| `<|det|>[[x0, y0, x1, y1]]<|/det|>` | 0 to 999 | DeepSeek-VL2 and -OCR |
| `<loc0256>` four times, y0 x0 y1 x1 | 1024 bins | PaliGemma |
| `<loc_52>` four times, x0 y0 x1 y1 | middles of 1000 bins | Florence-2 |
| `<patch_index_0044><patch_index_0863>` | cells of a 32 x 32 grid | Kosmos-2 |
| `"box_2d": [y0, x0, y1, x1]` | thousandths | Gemini, Gemma 3 |
| `"bbox_2d": [x0, y0, x1, y1]`, `"bbox"`, `"box"` | `coord` | Qwen2.5-VL (pixels of the resized image), Qwen3-VL |
| `[x0, y0, x1, y1]`, `[[...]]`, `(...)`, `(x0,y0),(x1,y1)`, four bare numbers | `coord` | the rest |
| `<point x="61.5" y="40.4">`, `<points x1= y1= x2= y2=>` | percent | Molmo, PixMo |
| `<points coords="1 1 105 205 2 300 400">` | thousandths | Molmo 2 |
| `"point_2d": [x, y]`, `[x, y]`, `(x, y)`, two bare numbers | `coord` | the rest |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Size = tuple[int, int]
Coord = Literal["pixel", "unit", "per_mille", "percent"]

SCALES = {"unit": 1.0, "percent": 100.0, "per_mille": 1000.0}
_N = r"\s*([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s*"
_FOUR = ",".join([_N] * 4)
_TWO = f"{_N},{_N}"
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?![\d.])")
_CELLS = 32  # of Kosmos-2, along each side

Numbers = tuple[float, ...]
Scale = tuple[float, float]


def parse_boxes(text: str, *, coord: Coord = "per_mille", size: Size | None = None) -> list[Box]:
    """The boxes in a text, in fractions of the image, in the order of the text.

    Args:
        text: anything; what is no box is left out, so that malformed boxes are no boxes. So are
            boxes without area or with their corners swapped.
        coord: what the numbers of notations count that do not say so: "pixel", "unit", "per_mille"
            or "percent".
        size: (width, height) of the image whose pixels are counted; "pixel" needs it.

    Returns:
        (x0, y0, x1, y1) each; may exceed 0 to 1.

    Raises:
        ValueError: an unknown `coord`, or "pixel" without a size.
    """
    own = _scale(coord, size)
    for notation in _BOX_NOTATIONS:
        boxes = [box for box in notation(text, own) if box[0] < box[2] and box[1] < box[3]]
        if boxes:
            return boxes
    return []


def parse_points(text: str, *, coord: Coord = "per_mille", size: Size | None = None) -> list[Point]:
    """The points in a text, in fractions of the image; arguments as for `parse_boxes`.

    Boxes are not read as points, except that `(x0,y0),(x1,y1)` without a tag is two of them.

    Returns:
        (x, y) each; may exceed 0 to 1.

    Raises:
        ValueError: as `parse_boxes`.
    """
    own = _scale(coord, size)
    for notation in _POINT_NOTATIONS:
        points = list(notation(text, own))
        if points:
            return points
    return []


def _scale(coord: str, size: Size | None) -> Scale:
    if coord == "pixel":
        if size is None:
            raise ValueError("`size`: expected (width, height) for pixel coordinates, got None")
        return float(size[0]), float(size[1])
    if coord not in SCALES:
        raise ValueError(f"`coord`: expected pixel or one of {', '.join(SCALES)}, got {coord!r}")
    return SCALES[coord], SCALES[coord]


def _box(numbers: Numbers, scale: Scale) -> Box:
    (x0, y0, x1, y1), (width, height) = numbers, scale
    return x0 / width, y0 / height, x1 / width, y1 / height


def _floats(groups: tuple[str | None, ...]) -> Numbers:
    return tuple(float(group) for group in groups if group is not None)


def _loc(text: str, own: Scale) -> Iterator[Box]:
    """PaliGemma: y first."""
    for match in re.finditer(r"<loc(\d{4})>" * 4, text):
        y0, x0, y1, x1 = _floats(match.groups())
        yield _box((x0, y0, x1, y1), (1024.0, 1024.0))


def _florence(text: str, own: Scale) -> Iterator[Box]:
    for match in re.finditer(r"<loc_(\d{1,4})>" * 4, text):
        middles = tuple(value + 0.5 for value in _floats(match.groups()))
        yield _box(middles, (1000.0, 1000.0))


def _kosmos(text: str, own: Scale) -> Iterator[Box]:
    """From the middle of the first cell to that of the last; whole cells if they share a row."""
    for match in re.finditer(r"<patch_index_(\d{4})>" * 2, text):
        (y0, x0), (y1, x1) = (divmod(int(index), _CELLS) for index in match.groups())
        ends = (0.0, 1.0) if x0 == x1 or y0 == y1 else (0.5, 0.5)
        corners = (x0 + ends[0], y0 + ends[0], x1 + ends[1], y1 + ends[1])
        yield _box(corners, (_CELLS, _CELLS))


def _tagged(opening: str, closing: str, whole: float, count: int) -> Callable[..., Iterator]:
    """The numbers between two tags (or behind one that was never closed), `count` by `count`."""
    pattern = re.compile(f"{opening}([^<]{{0,1000}})(?:{closing}|$)")

    def notation(text: str, own: Scale) -> Iterator:
        for match in pattern.finditer(text):
            values = [float(value) / whole for value in _NUMBER.findall(match[1])]
            if values and len(values) % count == 0:
                for i in range(0, len(values), count):
                    yield tuple(values[i : i + count])

    return notation


def _listed(pattern: str, *, flipped: bool = False, whole: float | None = None) -> Callable:
    """The groups of a pattern: four numbers or two; `flipped`: y before x; whole: not `coord`."""
    compiled = re.compile(pattern)

    def notation(text: str, own: Scale) -> Iterator:
        scale = own if whole is None else (whole, whole)
        for match in compiled.finditer(text):
            values = _floats(match.groups())
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            if flipped:
                pairs = [pair[::-1] for pair in pairs]
            yield tuple(v / s for pair in pairs for v, s in zip(pair, scale, strict=True))

    return notation


def _bare(count: int) -> Callable:
    """Numbers that are the whole text, with commas or white space between."""
    pattern = re.compile(r"(?:\s*,\s*|\s+)".join([_N.replace(r"\s*", "")] * count))

    def notation(text: str, own: Scale) -> Iterator:
        match = pattern.fullmatch(text.strip().removesuffix("."))
        if match:
            values = _floats(match.groups())
            yield tuple(v / own[i % 2] for i, v in enumerate(values))

    return notation


def _molmo(text: str, own: Scale) -> Iterator[Point]:
    for match in re.finditer(r"<points?\s([^<>]{0,20000})>", text):
        attributes = re.findall(rf"\b([xy])(\d{{0,6}})\s*=\s*[\"']?{_N}", match[1])
        places: dict[str, dict[str, float]] = {}
        for axis, number, value in attributes:
            places.setdefault(number, {})[axis] = float(value) / 100
        for place in places.values():
            if len(place) == 2:
                yield place["x"], place["y"]


def _molmo2(text: str, own: Scale) -> Iterator[Point]:
    """An image's number, then for each point its number, x and y."""
    for match in re.finditer(r"\bcoords\s*=\s*[\"']([^\"'<>]{0,20000})", text):
        for image in re.split(r"[;:\t]", match[1]):
            values = [float(value) for value in _NUMBER.findall(image)][1:]
            if len(values) % 3 == 0:
                for i in range(0, len(values), 3):
                    yield values[i + 1] / 1000, values[i + 2] / 1000


def _key(*names: str) -> str:
    return rf"[\"'](?:{'|'.join(names)})[\"']\s*:\s*\[?"


_QWEN = (r"(?:<box>|<\|box_start\|>)", r"(?:</box>|<\|box_end\|>)", 1000.0)
_BOX_NOTATIONS: tuple[Callable[[str, Scale], Iterator[Box]], ...] = (
    _loc,
    _florence,
    _kosmos,
    _tagged(r"<\|det\|>", r"<\|/det\|>", 999.0, 4),
    _tagged(*_QWEN, 4),
    _listed(rf"{_key('box_2d')}\[{_FOUR}\]", flipped=True, whole=1000.0),
    _listed(rf"{_key('bbox_2d', 'bbox', 'box', 'bounding_box')}\[{_FOUR}\]"),
    _listed(
        rf"(?<=[\[(;]){_FOUR}(?=[\]);])"
        rf"|\({_TWO}\)\s*,?\s*\({_TWO}\)"
        rf"|\[{_TWO}\]\s*,\s*\[{_TWO}\]"
    ),
    _bare(4),
)
_POINT_NOTATIONS: tuple[Callable[[str, Scale], Iterator[Point]], ...] = (
    _molmo2,
    _molmo,
    _tagged(*_QWEN, 2),
    _listed(rf"{_key('point')}\[{_TWO}\]", flipped=True, whole=1000.0),
    _listed(rf"{_key('point_2d')}\[{_TWO}\]"),
    _listed(rf"\bx\s*[=:]{_N},?\s*y\s*[=:]{_N}"),
    _listed(rf"[\[(]{_TWO}[\])]"),
    _bare(2),
)
