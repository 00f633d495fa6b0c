"""SROIE: receipts, their lines, and the company, date, address and total of each.

On disk: a folder with `img/<receipt>.jpg`, `box/<receipt>.csv` (or `.txt`; a line is four corners
x, y and a text, which may hold commas) and `key/<receipt>.json` (or in `entities`), or a folder of
such folders (`--split train`).

A value's regions are the lines that print it, found by their text without white space, without
regard to case, and if that is nowhere without punctuation. Of a line that prints more than the
value, the part is the share of its characters. A total that is printed several times is the one
beside the word "total"; if that does not tell, it is passed over.

Source: rrc.cvc.uab.es, challenge 13; arXiv 2103.10213.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.namesakes import Images, Where
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, first_there, size_of
from groundkern.trainer.prepare.reading import plain_json, split_lines
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = (Phrasing("What is the {field} of this receipt?", "{answer}"), ("field", "answer"))
FIELDS = ("company", "date", "address", "total")
_LARGEST = 1 << 20  # bytes of a file of lines or of values
_ENDINGS = (".jpg", ".png", ".jpeg")


class Line(NamedTuple):
    """A line of a receipt: its box in pixels, and its text."""

    box: tuple[float, float, float, float]
    text: str


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The values of all receipts."""
    top = options.data if options.split is None else options.data / options.split
    keys = [file for name in ("key", "entities") for file in sorted(top.rglob(f"{name}/*.*"))]
    keys = [file for file in keys if file.suffix in (".json", ".txt")]
    if not keys:
        raise ConfigError(f"{top}: expected the folders img, box and key (or entities)")
    root = options.images or options.data

    def read() -> Iterator[tuple[str, Any]]:
        images = Images(root, lambda: (_where(key, root) for key in keys))
        for key in keys:
            yield from _values(key, options.data, images.find(_where(key, root)))

    return listed(read, keys), root


def _where(key: Path, root: Path) -> Where:
    """Where a receipt's image lies beside its values, and by its name alone."""
    beside = os.path.relpath(key.parent.parent / "img" / key.stem, root)
    places, by_name = ([stem + end for end in _ENDINGS] for stem in (beside, key.stem))
    return Where(str(key), places, by_name)


def _values(key: Path, data: Path, image: str) -> Iterator[tuple[str, Any]]:
    where, folder = os.path.relpath(key, data), key.parent.parent
    try:
        found = plain_json(_text(key))
        boxes = first_there(folder, [f"box/{key.stem}.csv", f"box/{key.stem}.txt"])
        lines = read_lines(_text(folder / boxes))
        if not isinstance(found, dict):
            raise ValueError("expected an object of values")
    except (OSError, ValueError) as error:
        yield where, Unusable(where, f"expected a receipt's values and lines ({error})")
        return
    for name in FIELDS:
        value, there = found.get(name), f"{where}: {name}"
        if not isinstance(value, str) or not value.strip():
            yield there, Unusable(value, "expected a text, got none", "values that are empty")
            continue
        places = printed(value, lines)
        if name == "total" and len(places) > 1:
            places = [place for place in places if _beside_total(place[0][1], lines)]
            if not places:
                why = f"expected {value!r:.80} beside the word total, got it elsewhere"
                yield there, Unusable(value, why, "totals that are printed several times")
                continue
        if not places:
            why = f"expected {value!r:.80} to be printed, got no lines of it"
            yield there, Unusable(value, why, "values that no lines print")
            continue
        boxes = [list(box) for place in places for box, _ in place]
        yield there, {"image": image, "field": name, "answer": value.strip(), "boxes": boxes}


def _text(file: Path) -> str:
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"more than {_LARGEST} bytes in {file.name}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: expected UTF-8 ({error.reason})") from None


def read_lines(text: str) -> list[Line]:
    """The lines of a file of boxes.

    Raises:
        ValueError: a line without eight numbers.
    """
    found = []
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip():
            continue
        parts = line.split(",", 8)
        try:
            corners = [float(part) for part in parts[:8]]
            xs, ys = corners[::2], corners[1::2]
            found.append(Line((min(xs), min(ys), max(xs), max(ys)), parts[8]))
        except (ValueError, IndexError):
            raise ValueError(f"line {number}: expected 8 numbers and a text") from None
    return found


def printed(value: str, lines: Sequence[Line]) -> list[list[tuple[Sequence[float], Line]]]:
    """Where a value is printed: for each time, the (part of the box, line) of its lines."""
    for kept in (r"\S", r"\w"):
        wanted = "".join(re.findall(kept, value)).casefold()
        if not any(letter.isalpha() for letter in value) and kept == r"\w":
            break  # the digits alone of a price could be those of another
        found = [place for i in range(len(lines)) if (place := _from(i, wanted, kept, lines))]
        if wanted and found:
            return found
    return []


def _from(first: int, wanted: str, kept: str, lines: Sequence[Line]) -> list:
    """The parts of the lines that print a text whose first letter is in line `first`."""
    letters: list[tuple[str, int, int]] = []  # letter, its line, its place there
    for number in range(first, len(lines)):
        for match in re.finditer(kept, lines[number].text):
            letters += [(letter, number, match.start()) for letter in match[0].casefold()]
        if number == first:
            starts = len(letters)
        if len(letters) >= starts + len(wanted):
            break
    text = "".join(letter for letter, _, _ in letters)
    at = -1
    while 0 <= (at := text.find(wanted, at + 1)) < starts:
        inside = letters[at : at + len(wanted)]
        if _whole(inside, lines):
            return _parts(inside, lines)
    return []


def _whole(inside: list[tuple[str, int, int]], lines: Sequence[Line]) -> bool:
    """Whether what stands before and after a text belongs to no word or number of it."""
    (_, first, start), (_, last, stop) = inside[0], inside[-1]
    before, after = lines[first].text[:start], lines[last].text[stop + 1 :]
    return not (re.search(r"\w$|\d[.,]$", before) or re.match(r"\w|[.,]\d", after))


def _parts(inside: list[tuple[str, int, int]], lines: Sequence[Line]) -> list:
    """(part of the box, line) of each line that letters are of, by the share of characters."""
    found = []
    for number in dict.fromkeys(number for _, number, _ in inside):
        line = lines[number]
        places = [place for _, of, place in inside if of == number]
        x0, y0, x1, y1 = line.box
        length = len(line.text)
        left, right = min(places), max(places) + 1
        if line.text[:left].strip() or line.text[right:].strip():
            x0, x1 = x0 + (x1 - x0) * left / length, x0 + (x1 - x0) * right / length
        found.append(((x0, y0, x1, y1), line))
    return found


def _beside_total(line: Line, lines: Sequence[Line]) -> bool:
    """Whether a line, or one of its row, says total and not subtotal."""
    _, top, _, bottom = line.box
    for other in lines:
        overlap = min(bottom, other.box[3]) - max(top, other.box[1])
        if 2 * overlap >= min(bottom - top, other.box[3] - other.box[1]):
            said = re.sub(r"\W", "", other.text).casefold()
            if "total" in said and "subtotal" not in said:
                return True
    return False


def convert(item: Item, options: Options) -> Made:
    """One value; its regions are the lines that print it."""
    row, where = item.value, item.where
    frame = Frame(*size_of(row["image"], options.root, where), options.overhang, where)
    places, moved = [], 0
    for box in row["boxes"]:
        inside, cut = frame.box(box, "box")
        places.append({"box": inside})
        moved += len(cut)
    values = {"field": row["field"], "answer": row["answer"]}
    sample = options.phrasing(PHRASING[0]).sample("sroie", row["image"], values, places)
    return Made([sample], {}, {"regions": len(places), "boxes_cut": moved})
