"""The canonical sample, a JSON object a line (docs/data/data-format.md): parsed, checked, resolved.

Whatever is wrong with a sample is raised as one `SampleError` that names the line, the field, what
was wanted and what came. Records are what the file says; a `Sample` has spans in characters and
coordinates in fractions of the EXIF-rotated image, and needs no further check.
"""

from __future__ import annotations

import difflib
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
from groundkern.trainer.data.images import (
    MAX_PIXELS,
    SampleError,
    confined,
    image_size,
    load_rgb,
    wrong,
)
from groundkern.trainer.data.rasters import Stored, find_rasters, with_rasters
from groundkern.trainer.data.record import (
    MessageRecord,
    MomentRecord,
    PartRecord,
    PhraseRecord,
    RegionRecord,
    SampleRecord,
    VideoRecord,
    WordRecord,
)
from groundkern.trainer.data.resolving import Resolver, Size
from groundkern.trainer.data.videos import RULES, StoredVideo, VideoRules, find_videos
from groundkern.trainer.wording import VALUE, cut, short

FIELDS = {
    "messages": MessageRecord,
    "content": PartRecord,
    "videos": VideoRecord,
    "regions": RegionRecord,
    "track": MomentRecord,
    "words": WordRecord,
    "phrases": PhraseRecord,
}  # what a field of records holds
PLACEHOLDERS = ("<image>", "<video>", "<|image_pad|>", "<|video_pad|>")
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
        videos: their headers, and which frames are taken.
        grounding_weight: multiplies the weights of regions, words and phrases.
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
    videos: tuple[StoredVideo, ...] = ()
    grounding_weight: float = 1.0

    def load(self, decode: Callable[..., Image.Image] = load_rgb) -> GroundedExample:
        """Decode the images, videos and rasters.

        Args:
            decode: in the place of `load_rgb`, with its arguments; of images.

        Returns:
            The sample as the collator takes it, with no further check of spans and places.

        Raises:
            SampleError: one of them is corrupt, truncated, empty, or not what it was.
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
            videos=tuple(video.load() for video in self.videos),
            grounding_weight=self.grounding_weight,
        )


def parse_sample(
    line: str | bytes | dict,
    *,
    root: Path,
    where: str,
    max_pixels: int = MAX_PIXELS,
    videos: VideoRules = RULES,
) -> Sample:
    """Check one sample and resolve its spans and coordinates; reads headers, no pixels.

    Args:
        line: a line of JSON (UTF-8 if bytes), or the object it holds.
        root: the folder that image paths are relative to and may not leave.
        where: what starts every error message, for example `train.jsonl:17`.
        max_pixels: width x height that an image or a frame may have.
        videos: which frames of a video are taken, and what it may be.

    Returns:
        The sample, in fractions of the EXIF-rotated images and the upright frames.

    Raises:
        SampleError: one sentence: line, field, wanted, got.
    """
    value = line if isinstance(line, dict) else decode_line(line, where)
    unicode = isinstance(line, bytes) and not _SURROGATE.search(line)
    record = validated(value, where, unicode=unicode)
    messages = [_chat_message(message) for message in record.messages]
    _check_messages(record, messages, where)
    images, sizes = [], []
    for i, path in enumerate(record.images):
        images.append(confined(path, root, where=where, field=f"images[{i}]"))
        size = image_size(images[-1], max_pixels=max_pixels, where=where, field=f"images[{i}]")
        sizes.append(size)
    limits = {"root": root, "max_pixels": max_pixels, "where": where}
    films = find_videos(record.videos, rules=videos, **limits) if record.videos else ()
    resolve = Resolver(messages, tuple(sizes), where, films)
    each = [resolve.regions(r, f"regions[{i}]") for i, r in enumerate(record.regions)]
    canvases = [sizes[r.image] if r.video is None else films[r.video].size for r, *_ in each]
    timed = [r.video is not None for r, *_ in each]
    rasters = dict(find_rasters(record.regions, canvases, timed, **limits))
    origins = [i for i, parts in enumerate(each) for _ in parts]
    return Sample(
        where=where,
        task=record.task,
        images=tuple(images),
        sizes=tuple(sizes),
        messages=messages,
        regions=tuple(region for parts in each for region in parts),
        words=tuple(resolve.word(w, f"words[{i}]") for i, w in enumerate(record.words)),
        phrases=tuple(resolve.phrase(p, f"phrases[{i}]") for i, p in enumerate(record.phrases)),
        answers=tuple(record.answers),
        metrics=tuple(record.metrics),
        tools=tuple(record.tools),
        rasters=tuple((k, rasters[i]) for k, i in enumerate(origins) if i in rasters),
        videos=films,
        grounding_weight=record.grounding_weight,
    )


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


def validated(value: dict[str, Any], where: str, *, unicode: bool = False) -> SampleRecord:
    """The record of a value, of which only the fields and their types are checked.

    Args:
        value: as JSON has it.
        where: what starts an error message.
        unicode: no text in it can have half a surrogate pair.

    Raises:
        SampleError: one sentence: line, field, wanted, got.
    """
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
        # not the alternatives of `content` and `time`
        if isinstance(part, int) or not (part == "str" or part.startswith(("list[", "tuple["))):
            field += f"[{part}]" if isinstance(part, int) else f".{cut(part, VALUE)}"
    got = short(problem["input"])
    match problem["type"]:
        case "missing":
            wanted, got = "a value", "nothing"
        case "extra_forbidden":
            wanted = "a field of the format (docs/data/data-format.md)"
            got = f"an unknown name{_meant(problem['loc'])}"
        case "literal_error":
            wanted = problem["ctx"]["expected"]
        case _:
            wanted = problem["msg"].removeprefix("Input should be ").lower()
    raise wrong(where, field.removeprefix("."), wanted, got)


def _meant(loc: tuple[int | str, ...]) -> str:
    """The field that an unknown name at this place may be; "" if none is like it."""
    *inside, name = (part for part in loc if isinstance(part, str))
    known = next((FIELDS[part] for part in reversed(inside) if part in FIELDS), SampleRecord)
    # comparing takes time that grows with the square of a name
    close = difflib.get_close_matches(name[:100], known.model_fields, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _check_messages(record: SampleRecord, messages: list[dict[str, Any]], where: str) -> None:
    """Roles, and placeholders against images and videos."""
    if not any(map(is_trained, messages)):
        raise wrong(where, "messages", "at least one assistant message to train on", "none")
    if character := unusable(json.dumps(record.tools, ensure_ascii=False)):
        raise wrong(where, "tools", USABLE_TEXT, character)
    slots = Counter()
    for i, message in enumerate(record.messages):
        parts = [] if isinstance(message.content, str) else message.content
        field = f"messages[{i}].content"
        if not message.train and message.role != "assistant":
            wanted, got = "it in an assistant message", f"one of role {message.role}"
            raise wrong(where, f"messages[{i}].train", wanted, got)
        here = Counter(part.type for part in parts if part.type != "text")
        slots += here
        if here and message.role != "user":
            wanted = f"{min(here)}s in user messages only"
            raise wrong(where, field, wanted, message.role)
        if worded := [part.type for part in parts if part.type != "text" and part.text]:
            raise wrong(where, field, f"no text in parts of type {worded[0]}", "some")
        text = message_text(messages[i])
        written = [name for name in PLACEHOLDERS if name in text]
        if written:
            kind = "video" if "video" in written[0] else "image"
            wanted = f'{kind}s as parts, {{"type": "{kind}"}}'
            raise wrong(where, field, wanted, f"the text {written[0]}")
        if character := unusable(text):
            raise wrong(where, field, USABLE_TEXT, character)
    for kind, count in (("image", len(record.images)), ("video", len(record.videos))):
        if slots[kind] not in (0, count):
            wanted = f"{count} {kind} parts, one for each {kind}, or none"
            raise wrong(where, "messages", wanted, slots[kind])


def _chat_message(message: MessageRecord) -> dict[str, Any]:
    content: str | list[dict[str, str]] = message.content
    if isinstance(content, list):
        content = [
            {"type": "text", "text": part.text} if part.type == "text" else {"type": part.type}
            for part in message.content
        ]
    context = {} if message.train else {"train": False}
    return {"role": message.role, "content": content, **context}
