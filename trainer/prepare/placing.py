"""Makes a question, an answer and the answer's region of a label and its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from trainer.config import ConfigError
from trainer.data.images import SampleError, confined, image_size, wrong
from trainer.records import chat_sample

Size = tuple[int, int]

TITLES = {
    "regions": "regions",
    "boxes_cut": "boxes that stuck out of their image a little (or points), moved to its edge",
}


@dataclass(frozen=True)
class Phrasing:
    """A question and an answer with places for values, such as `Where is the {label}?`.

    The value of the answer's first `{...}` is tied to the place; an answer without one is
    tied as a whole.

    Args:
        question, answer: texts; `{{` and `}}` are braces.
    """

    question: str
    answer: str

    def check(self, known: Sequence[str]) -> Phrasing:
        """This phrasing, known to use nothing but the named values.

        Raises:
            ConfigError: another name, or a stray brace.
        """
        for option, text in (("question", self.question), ("answer", self.answer)):
            try:
                parts = list(Formatter().parse(text))
            except ValueError as error:
                raise ConfigError(f"`--{option}`: expected a text ({error})") from None
            for _, name, form, turned in parts:
                if name is not None and (name not in known or form or turned):
                    values = ", ".join(f"{{{value}}}" for value in known)
                    raise ConfigError(f"`--{option}`: expected {values}, got {{{name}}}")
        if not self.answer:
            raise ConfigError("`--answer`: expected a text, got none")
        return self

    def sample(
        self, task: str, image: str, values: Mapping[str, str], places: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """A record of docs/data-format.md.

        Args:
            task: the record's label.
            image: its path, relative to the data root.
            values: what the names in braces stand for.
            places: the parts of regions that say where.
        """
        answer, span = self.filled(values)
        question = self.question.format_map(values)
        regions = [{"char_span": span, **place} for place in places]
        return chat_sample([image], question, answer, task=task, regions=regions)

    def filled(self, values: Mapping[str, str]) -> tuple[str, list[int]]:
        """The answer, and the span in it that is tied to the place."""
        answer, span = "", None
        for literal, name, _, _ in Formatter().parse(self.answer):
            answer += literal
            if name is not None:
                start, answer = len(answer), answer + values[name]
                span = span or [start, len(answer)]
        return answer, span or [0, len(answer)]


@dataclass(frozen=True)
class Frame:
    """An image's extent in the units of its annotations, and how far they may stick out.

    Args:
        width, height: of the whole image.
        overhang: share of a side by which a box or point may lie outside; it is cut at the edge.
        where: what starts every error message.
    """

    width: float
    height: float
    overhang: float
    where: str

    def box(
        self, values: Any, field: str, *, order: str = "xyxy"
    ) -> tuple[list[float], dict[str, int]]:
        """(edges [x0, y0, x1, y1] inside the image, counts) of a box.

        `order` is "xyxy", "xywh" from the top left corner, or "cxcywh" from the centre.

        Raises:
            SampleError: not four finite numbers, inverted or empty, too far outside.
        """
        first, second, third, fourth = numbers(values, 4, self.where, field)
        if order == "cxcywh":
            first, second = first - third / 2, second - fourth / 2
        if order != "xyxy":
            third, fourth = first + third, second + fourth
        if not (first < third and second < fourth):
            wanted = "x0 < x1, y0 < y1" if order == "xyxy" else "positive width and height"
            raise wrong(self.where, field, wanted, values)
        low, cut_low = self.point([first, second], field, got=values)
        high, cut_high = self.point([third, fourth], field, got=values)
        if not (low[0] < high[0] and low[1] < high[1]):
            raise wrong(self.where, field, "a box that overlaps the image", values)
        return [*low, *high], {"boxes_cut": 1} if cut_low or cut_high else {}

    def point(self, values: Any, field: str, *, got: Any = None) -> tuple[list[float], bool]:
        """([x, y] inside the image, whether it was moved there) of a point.

        Raises:
            SampleError: not two finite numbers, too far outside.
        """
        inside, moved = [], False
        sides = (self.width, self.height)
        for value, side in zip(numbers(values, 2, self.where, field), sides, strict=True):
            if not -self.overhang * side <= value <= side * (1 + self.overhang):
                wanted = f"coordinates within {self.width:g} x {self.height:g}"
                raise wrong(self.where, field, wanted, values if got is None else got)
            inside.append(min(float(side), max(0.0, float(value))))
            moved |= inside[-1] != value
        return inside, moved


def numbers(values: Any, count: int, where: str, field: str) -> list[float]:
    """`count` finite numbers.

    Raises:
        SampleError: anything else.
    """
    if not isinstance(values, list | tuple) or len(values) != count:
        raise wrong(where, field, f"{count} numbers", repr(values)[:80])
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(where, field, f"{count} numbers", repr(values)[:80])
        if not abs(value) < 1e15:  # not a number, infinite, or absurd
            raise wrong(where, field, f"{count} finite numbers", repr(values)[:80])
    return list(values)


def field_of(record: Any, name: str, kind: type | tuple, where: str) -> Any:
    """A field of a record, known to be there and of a kind.

    Raises:
        SampleError: `record` is no object, or the field is missing, empty or of another kind.
    """
    if not isinstance(record, dict):
        raise SampleError(f"{where}: expected an object, got {repr(record)[:80]}")
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
        words = " or ".join(dict.fromkeys(wanted.get(each, "a number") for each in kinds))
        raise wrong(where, name, words, repr(value)[:80] if name in record else "nothing")
    if isinstance(value, str) and not value.strip():
        raise wrong(where, name, "a text", repr(value))
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise wrong(where, name, "Unicode text", "half a surrogate pair")
    return value


def size_of(path: str, root: Path, where: str) -> Size:
    """(width, height) of an image below the root, from its header, EXIF rotation applied.

    Raises:
        SampleError: not there, outside the root, no image.
    """
    file = confined(path, root, where=where, field="images[0]")
    return image_size(file, where=where, field="images[0]")


def first_there(root: Path, candidates: Sequence[str]) -> str:
    """The first of the paths that is a file below the root; the first of all if none is."""
    for candidate in candidates:
        try:
            if (root / candidate).is_file():
                return candidate
        except (OSError, ValueError):  # a name that is too long, or has a null character
            continue
    return candidates[0]


def per_mille(box: Sequence[float], size: tuple[float, float]) -> str:
    """A box as text, in thousandths of the image, as Qwen3-VL writes it."""
    sides = (*size, *size)
    return str([round(value * 1000 / side) for value, side in zip(box, sides, strict=True)])
