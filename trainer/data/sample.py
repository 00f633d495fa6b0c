"""The canonical sample, one JSON object a line (docs/data-format.md): parsed, checked, resolved.

Whatever is wrong with a sample is raised as one `SampleError` that names the line, the field, what
was wanted and what came. Records are what the file says; a `Sample` has spans in characters and
coordinates in fractions of the EXIF-rotated image, and needs no further check.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from groundkern.hf.data.example import (
    USABLE_TEXT,
    GroundedExample,
    Phrase,
    Region,
    Word,
    is_trained,
    message_text,
    unusable,
)
from trainer.data.finding import difference, occurrences
from trainer.data.images import MAX_PIXELS, SampleError, confined, image_size, load_rgb, wrong
from trainer.data.rasters import Stored, find_rasters, with_rasters
from trainer.data.record import (
    MessageRecord,
    PhraseRecord,
    PlaceRecord,
    RegionRecord,
    SampleRecord,
    SpanRecord,
    WordRecord,
)
from trainer.wording import VALUE, cut, short

Size = tuple[int, int]
PLACEHOLDERS = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>")
PLACES = ("box", "points", "polygon", "polyline", "mask", "heat")
SLACK = 1e-6  # of the image: a coordinate this far outside is a rounding error
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON in UTF-8 can spell one, half or whole


@dataclass(frozen=True)
class Sample:
    """A checked sample; its pixels are still on disk. Its `id` and `meta` stay in the file.

    Args:
        where: what error messages call it, for example `train.jsonl:17`.
        task: the record's free label, for evaluation by task.
        images: real paths, inside the data root.
        sizes: (width, height) of each image after EXIF rotation, in pixels.
        messages: Hugging Face chat messages.
        tools: JSON schemas of functions.
        regions, words, phrases: in fractions of the rotated images.
        answers: other right forms of the last answer, for evaluation.
        metrics: the names of metrics that the sample asks for.
        rasters: the index of a region and where its mask or heat is, which `load` puts into it.
    """

    where: str
    task: str
    images: tuple[Path, ...]
    sizes: tuple[Size, ...]
    messages: list[dict[str, Any]]
    regions: tuple[Region, ...]
    words: tuple[Word, ...]
    phrases: tuple[Phrase, ...]
    answers: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    rasters: tuple[tuple[int, Stored], ...] = ()

    def load(self, decode: Callable[..., Image.Image] = load_rgb) -> GroundedExample:
        """Decode the images and rasters.

        Args:
            decode: in the place of `load_rgb`, with its arguments.

        Returns:
            The sample as the collator takes it, with no further check of spans and places.

        Raises:
            SampleError: an image or a raster is corrupt, truncated, empty, or not what it was.
        """
        pairs = enumerate(zip(self.images, self.sizes, strict=True))
        pictures = [
            decode(path, size, where=self.where, field=f"images[{i}]") for i, (path, size) in pairs
        ]
        return GroundedExample(
            images=tuple(pictures),
            messages=self.messages,
            regions=with_rasters(self.regions, self.rasters),
            words=self.words,
            phrases=self.phrases,
            tools=self.tools,
            name=self.where,
            checked=True,
        )


def parse_sample(
    line: str | bytes | dict, *, root: Path, where: str, max_pixels: int = MAX_PIXELS
) -> Sample:
    """Check one sample and resolve its spans and coordinates; reads image headers, no pixels.

    Args:
        line: a line of JSON (UTF-8 if bytes), or the object it holds.
        root: the folder that image paths are relative to and may not leave.
        where: what starts every error message, for example `train.jsonl:17`.
        max_pixels: width x height that an image may have.

    Returns:
        The sample, in fractions of the EXIF-rotated images.

    Raises:
        SampleError: one sentence: line, field, wanted, got.
    """
    value = line if isinstance(line, dict) else decode_line(line, where)
    unicode = isinstance(line, bytes) and not _SURROGATE.search(line)
    record = _validated(value, where, unicode=unicode)
    messages = [_chat_message(message) for message in record.messages]
    _check_messages(record, messages, where)
    images, sizes = [], []
    for i, path in enumerate(record.images):
        images.append(confined(path, root, where=where, field=f"images[{i}]"))
        size = image_size(images[-1], max_pixels=max_pixels, where=where, field=f"images[{i}]")
        sizes.append(size)
    resolve = _Resolver(messages, tuple(sizes), where)
    regions = tuple(resolve.region(r, f"regions[{i}]") for i, r in enumerate(record.regions))
    limits = {"root": root, "max_pixels": max_pixels, "where": where}
    return Sample(
        where=where,
        task=record.task,
        images=tuple(images),
        sizes=tuple(sizes),
        messages=messages,
        regions=regions,
        words=tuple(resolve.word(w, f"words[{i}]") for i, w in enumerate(record.words)),
        phrases=tuple(resolve.phrase(p, f"phrases[{i}]") for i, p in enumerate(record.phrases)),
        answers=tuple(record.answers),
        metrics=tuple(record.metrics),
        tools=tuple(record.tools),
        rasters=find_rasters(record.regions, regions, sizes, **limits),
    )


class _Resolver:
    """Spans to characters and coordinates to fractions, for one sample."""

    def __init__(self, messages: list[dict[str, Any]], sizes: tuple[Size, ...], where: str) -> None:
        self.sizes, self.where = sizes, where
        self.roles = [message["role"] for message in messages]
        self.texts = [message_text(message) for message in messages]
        self.answers = [i for i, role in enumerate(self.roles) if role == "assistant"]

    def region(self, region: RegionRecord, field: str) -> Region:
        given = [k for k in PLACES if getattr(region, k) is not None]
        if len(given) != 1:
            wanted = f"one of {', '.join(PLACES[:-1])} and {PLACES[-1]}"
            raise self._wrong(field, wanted, " and ".join(given) or "none")
        turn, start, stop = self._span(region, field)
        image = self._image(region, field)
        if region.box is not None:
            box = self._box(region.box, region, image, f"{field}.box")
            return Region(turn, start, stop, image, boxes=(box,))
        if given[0] in ("mask", "heat"):
            return Region(turn, start, stop, image)
        field = f"{field}.{given[0]}"
        if region.points is not None:
            points = self._points(region.points, region.coord, image, field)
            return Region(turn, start, stop, image, points=points)
        if region.polyline is not None:
            line = self._points(region.polyline, region.coord, image, field)
            if len(set(line)) < 2:
                raise self._wrong(field, "a line with a length", list(region.polyline))
            return Region(turn, start, stop, image, polylines=(line,))
        corners = self._points(region.polygon, region.coord, image, field)
        following = zip(corners, corners[1:] + corners[:1], strict=True)
        if abs(sum(x * b - a * y for (x, y), (a, b) in following)) <= 1e-12:
            raise self._wrong(field, "a polygon with an area", list(region.polygon))
        return Region(turn, start, stop, image, polygons=(corners,))

    def word(self, word: WordRecord, field: str) -> Word:
        if not word.text.strip():
            raise self._wrong(f"{field}.text", "a word", short(word.text))
        image = self._image(word, field)
        return Word(word.text, self._box(word.box, word, image, f"{field}.box"), image)

    def phrase(self, phrase: PhraseRecord, field: str) -> Phrase:
        turn, start, stop = self._span(phrase, field)
        if phrase.subject is None:
            return Phrase(turn, start, stop)
        text = self.texts[turn][start:stop]
        found = occurrences(phrase.subject, text)
        if not found:
            wanted = f"words of the phrase {short(text)}"
            raise self._wrong(f"{field}.subject", wanted, _unfound(phrase.subject, text))
        return Phrase(turn, start, stop, (start + found[0][0], start + found[0][1]))

    def _span(self, span: SpanRecord, field: str) -> tuple[int, int, int]:
        """(turn, start, stop) of the answer's characters that `span` names."""
        turn = self._turn(span, field)
        answer = self.texts[turn]
        if (span.text is None) == (span.char_span is None):
            got = "neither" if span.text is None else "both"
            raise self._wrong(field, "either text or char_span", got)
        if span.char_span is not None:
            start, stop = span.char_span
            if not start < stop <= len(answer):
                wanted = f"0 <= start < stop <= {len(answer)}, the answer's characters"
                raise self._wrong(f"{field}.char_span", wanted, list(span.char_span))
        else:
            start, stop = self._find(span, answer, turn, field)
        if not answer[start:stop].strip():
            wanted = f"a span of visible characters of {short(answer)}"
            raise self._wrong(field, wanted, f"{start}:{stop}")
        return turn, start, stop

    def _find(self, span: SpanRecord, answer: str, turn: int, field: str) -> tuple[int, int]:
        """(start, stop) of the named occurrence of the span's text."""
        found = occurrences(span.text, answer)
        if not found:
            wanted = f"text that occurs in message {turn}, {short(answer)}"
            raise self._wrong(f"{field}.text", wanted, _unfound(span.text, answer))
        if span.occurrence >= len(found):
            wanted = f"less than {len(found)}, as often as {short(span.text)} is in message {turn}"
            raise self._wrong(f"{field}.occurrence", wanted, span.occurrence)
        return found[span.occurrence]

    def _turn(self, span: SpanRecord, field: str) -> int:
        if span.turn is None and len(self.answers) > 1:
            wanted = f"one of the assistant messages {self.answers}"
            raise self._wrong(f"{field}.turn", wanted, "none")
        turn = self.answers[0] if span.turn is None else span.turn
        if turn not in self.answers:
            role = self.roles[turn] if turn < len(self.roles) else "no message"
            wanted = f"the index of an assistant message, {self.answers}"
            raise self._wrong(f"{field}.turn", wanted, f"{turn} ({role})")
        return turn

    def _image(self, place: PlaceRecord, field: str) -> int:
        count = len(self.sizes)
        if place.image is None and count > 1:
            raise self._wrong(f"{field}.image", f"one of the {count} images, from 0", "none")
        image = place.image or 0
        if image >= count:
            raise self._wrong(f"{field}.image", f"an index of the sample's {count} images", image)
        return image

    def _box(self, box: tuple, place: PlaceRecord, image: int, field: str) -> tuple:
        x0, y0, x1, y1 = box
        if place.order == "xywh":
            x1, y1 = x0 + x1, y0 + y1
        width, height = self._whole(place.coord, image)
        left, top = x0 / width + 0.0, y0 / height + 0.0  # as a clamp does it: no -0.0
        right, bottom = x1 / width, y1 / height
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:  # nothing to clamp or to say
            return left, top, right, bottom
        wanted = "positive width and height" if place.order == "xywh" else "x0 < x1, y0 < y1"
        if not (x0 < x1 and y0 < y1):
            raise self._wrong(field, wanted, list(box))
        low, high = self._points([(x0, y0), (x1, y1)], place.coord, image, field, box)
        if not (low[0] < high[0] and low[1] < high[1]):  # thinner than the rounding of SLACK
            raise self._wrong(field, wanted, list(box))
        return (*low, *high)

    def _points(self, points: list, coord: str, image: int, field: str, got=None) -> tuple:
        """The points as fractions of the image; `got` is what the error shows, if not `points`."""
        width, height = self._whole(coord, image)
        fractions = [(x / width, y / height) for x, y in points]
        if any(not -SLACK <= value <= 1 + SLACK for point in fractions for value in point):
            wanted = f"{coord} coordinates within image {image}, {width} x {height}"
            raise self._wrong(field, wanted, list(got or points))
        return tuple((min(1.0, max(0.0, x)), min(1.0, max(0.0, y))) for x, y in fractions)

    def _whole(self, coord: str, image: int) -> Size:
        """Width and height of an image in a kind of coordinates."""
        if coord == "pixel":
            return self.sizes[image]
        return (1000, 1000) if coord == "per_mille" else (1, 1)

    def _wrong(self, field: str, wanted: str, got: object) -> SampleError:
        return wrong(self.where, field, wanted, got)


def decode_line(line: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line, with or without a byte order mark.

    Args:
        line: UTF-8 if bytes.
        where: what starts an error message.

    Raises:
        SampleError: not UTF-8, not JSON, not an object, or a name twice in one object.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return made

    text = line
    try:
        if isinstance(line, bytes):
            text = line.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        got = f"{error.reason} at byte {error.start}"
        raise SampleError(f"{where}: expected UTF-8 text, got {got}") from None
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: expected a JSON object, got invalid JSON ({error})") from None
    if twice:
        raise wrong(where, cut(twice[0], VALUE), "a name once in an object", "it twice")
    if not isinstance(value, dict):
        raise SampleError(f"{where}: expected a JSON object, got {short(value)}")
    return value


def _validated(value: dict[str, Any], where: str, *, unicode: bool) -> SampleRecord:
    """The record of a value; `unicode` says that no text in it can have half a surrogate pair."""
    if "videos" in value:
        raise wrong(where, "videos", "images and text only", "videos, which are not supported yet")
    try:
        if not unicode:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        return SampleRecord.model_validate(value)
    except UnicodeEncodeError:
        raise SampleError(f"{where}: expected Unicode text, got half a surrogate pair") from None
    except ValidationError as error:
        problem = max(error.errors(), key=lambda each: len(each["loc"]))
    field = ""
    for part in problem["loc"]:
        if part not in ("str", "list[PartRecord]"):  # the alternatives of `content`
            field += f"[{part}]" if isinstance(part, int) else f".{cut(part, VALUE)}"
    got = short(problem["input"])
    match problem["type"]:
        case "missing":
            wanted, got = "a value", "nothing"
        case "extra_forbidden":
            wanted, got = "a field of the format (docs/data-format.md)", "an unknown name"
        case "literal_error":
            wanted = problem["ctx"]["expected"]
        case _:
            wanted = problem["msg"].removeprefix("Input should be ").lower()
    raise wrong(where, field.removeprefix("."), wanted, got)


def _check_messages(record: SampleRecord, messages: list[dict[str, Any]], where: str) -> None:
    """Roles, and image placeholders against images."""
    if not any(map(is_trained, messages)):
        raise wrong(where, "messages", "at least one assistant message to train on", "none")
    if character := unusable(json.dumps(record.tools, ensure_ascii=False)):
        raise wrong(where, "tools", USABLE_TEXT, character)
    slots = 0
    for i, message in enumerate(record.messages):
        parts = [] if isinstance(message.content, str) else message.content
        if not message.train and message.role != "assistant":
            raise wrong(where, f"messages[{i}].train", "it of assistant messages", message.role)
        here = sum(part.type == "image" for part in parts)
        slots += here
        if here and message.role != "user":
            raise wrong(
                where, f"messages[{i}].content", "images in user messages only", message.role
            )
        if any(part.type == "image" and part.text for part in parts):
            raise wrong(where, f"messages[{i}].content", "no text in an image part", "some")
        text = message_text(messages[i])
        written = [name for name in PLACEHOLDERS if name in text]
        if written:
            wanted = 'images as parts, {"type": "image"}'
            raise wrong(where, f"messages[{i}].content", wanted, f"the text {written[0]}")
        if character := unusable(text):
            raise wrong(where, f"messages[{i}].content", USABLE_TEXT, character)
    count = len(record.images)
    if slots not in (0, count):
        raise wrong(where, "messages", f"{count} image parts, one for each image, or none", slots)


def _chat_message(message: MessageRecord) -> dict[str, Any]:
    content: str | list[dict[str, str]] = message.content
    if isinstance(content, list):
        content = [
            {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
            for part in message.content
        ]
    context = {} if message.train else {"train": False}
    return {"role": message.role, "content": content, **context}


def _unfound(text: str, answer: str) -> str:
    why = difference(text, answer)
    return f"{short(text)}: {why}" if why else short(text)
