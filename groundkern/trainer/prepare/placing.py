"""Makes a question, an answer and the answer's region of a label and its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError, confined, image_size, wrong
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.writing import PER_MILLE, Writer
from groundkern.trainer.records import chat_sample

Size = tuple[int, int]

TITLES = {
    "regions": "regions",
    "boxes_cut": "boxes that stuck out of their image a little (or points), moved to its edge",
}


@dataclass(frozen=True)
class Tied:
    """A value of an answer whose parts belong to places of their own.

    Args:
        text: the value.
        regions: places with their `char_span` in the text.
    """

    text: str
    regions: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Phrasing:
    """A question and an answer with places for values, such as `Where is the {label}?`.

    The value of the answer's first `{...}` is tied to the place; an answer without one is
    tied as a whole. `{box}` and `{point}` are the places as a `Writer` writes them, each tied to
    its own numbers. In an answer without `{label}` they have the label too, if the style has any.

    Args:
        question, answer: texts; `{{` and `}}` are braces.
    """

    question: str
    answer: str

    def check(self, known: Sequence[str], writer: Writer = PER_MILLE) -> Phrasing:
        """This phrasing, known to use nothing but the named values, and what the writer has.

        Raises:
            ConfigError: another name, a stray brace, or boxes or points that the style has not.
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
                if name in ("box", "point") and getattr(writer.rules, name) is None:
                    wanted = f"a style that has {{{name}}}"
                    raise ConfigError(f"`--box-style`: expected {wanted}, got {writer.style}")
        if not self.answer:
            raise ConfigError("`--answer`: expected a text, got none")
        return self

    def sample(
        self,
        task: str,
        image: str,
        values: Mapping[str, str | Tied],
        places: Sequence[Mapping[str, Any]],
        *,
        size: Size | None = None,
        writer: Writer = PER_MILLE,
        where: str = "",
    ) -> dict[str, Any]:
        """A record of docs/data/data-format.md.

        Args:
            task: the record's label.
            image: its path, relative to the data root.
            values: what the names in braces stand for, but `{box}` and `{point}`.
            places: the parts of regions that say where, in pixels or with `coord` "unit".
            size: (width, height) of the image; `{box}` and `{point}` need it.
            writer: of these two.
            where: what starts an error message.

        Raises:
            SampleError: no place for `{box}` or `{point}`, or a label that the style cannot hold.
        """
        asked, answered = dict(values), dict(values)
        for text, said in ((self.question, asked), (self.answer, answered)):
            names = _names(text)
            label = said.get("label") if said is answered and "label" not in names else None
            for name in {"box", "point"} & set(names):
                said[name] = written(name, places, size, writer, label, where)
        answer, span = self.filled(answered)
        first = next((answered[name] for name in _names(self.answer)), None)
        parts = first.regions if isinstance(first, Tied) else ()
        regions = [
            {**part, "char_span": [at + span[0] for at in part["char_span"]]} for part in parts
        ]
        own = [{k: v for k, v in part.items() if k != "char_span"} for part in parts]
        regions += [{"char_span": span, **place} for place in places if place not in own]
        question = self.question.format_map(_texts(asked))
        return chat_sample([image], question, answer, task=task, regions=regions)

    def filled(self, values: Mapping[str, str | Tied]) -> tuple[str, list[int]]:
        """The answer, and the span in it that is tied to the place."""
        answer, span, texts = "", None, _texts(values)
        for literal, name, _, _ in Formatter().parse(self.answer):
            answer += literal
            if name is not None:
                start, answer = len(answer), answer + texts[name]
                span = span or [start, len(answer)]
        return answer, span or [0, len(answer)]


def _names(text: str) -> list[str]:
    """The names in braces, in order."""
    return [name for _, name, _, _ in Formatter().parse(text) if name is not None]


def _texts(values: Mapping[str, str | Tied]) -> dict[str, str]:
    return {name: v.text if isinstance(v, Tied) else v for name, v in values.items()}


def written(
    kind: str,
    places: Sequence[Mapping[str, Any]],
    size: Size,
    writer: Writer,
    label: str | None,
    where: str,
) -> Tied:
    """Boxes as a style writes them, or points: those of the places, and the middles of boxes.

    Args:
        kind: "box" or "point".
        places, size, writer, where: as of `Phrasing.sample`.
        label: what the style ties them to; None: nothing.

    Raises:
        SampleError: there are none, the style cannot hold the label, or the processor refuses
            the image.
    """
    found: list[tuple[Place, Mapping[str, Any]]] = []
    for place in places:
        sides = (1, 1) if place.get("coord") == "unit" else size
        box = place.get("box")
        shapes = [box] if box is not None else []
        if kind == "point":
            middles = [[(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in shapes]
            shapes = [*middles, *place.get("points", ())]
        for shape in shapes:
            numbers = tuple(value / sides[i % 2] for i, value in enumerate(shape))
            found.append((Place(numbers, label), place))
    if not found:
        raise wrong(where, "places", f"a {kind}, for {{{kind}}}", "none")
    try:
        made = writer.write([each for each, _ in found], size)
    except ValueError as error:
        raise SampleError(f"{where}: {error}") from None
    regions = []
    for part, (_, place) in zip(made.parts, found, strict=True):
        regions += [{"char_span": list(span), **place} for span in part if span is not None]
    return Tied(made.text, tuple(regions))


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
