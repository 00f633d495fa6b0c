"""What `GroundingCollator` turns into batches: images, videos, a chat, and what is known of them.

Every coordinate is a fraction of the EXIF-rotated original image or of a video's frame: x to the
right, y down, measured at pixel edges (the whole image is `(0, 0, 1, 1)`). Character spans index
the text of one assistant message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from groundkern.hf.data.video import (
    RasterTrack,
    Track,
    Video,
    check_raster_track,
    check_time,
    check_tracks,
)
from groundkern.messages import fail, require
from groundkern.rasters import Raster

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Polygon = tuple[Point, ...]
Bell = tuple[float, float, float, float]

LARGEST_WEIGHT = 1e9  # above it a number is a slip
USABLE_TEXT = "text without NUL, half surrogate pairs, U+FDD0 and U+FDD1"
# halves of surrogate pairs are no Unicode; between the two noncharacters texts are followed through
# the chat template
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNUSABLE = re.compile("[\0\ud800-\udfff\ufdd0\ufdd1]")


@dataclass(frozen=True)
class Region:
    """Words of an answer and the places of an image they speak of, which is all of them together.

    In a video, boxes, points, bells, polygons, polylines and rasters hold in every frame of the
    region's time; a region with a time and without a place is the whole of those frames.

    Args:
        turn: the index of an assistant message.
        start, stop: the characters of that message's text, `stop` exclusive.
        image: the index of the image; not looked at beside `video`.
        boxes: (x0, y0, x1, y1), in fractions of the image.
        points: (x, y).
        polygons: corners, three or more each.
        polylines: points of a line that is traced, two or more each.
        rasters: masks and heat-maps, each stretched over the whole image.
        video: the index of the video, if the words speak of one.
        time: seconds of the video, from the first up to the second; None: all of it.
        tracks: boxes that move.
        bells: points with a spread, (x, y, sx, sy): normal distributions with these standard
            deviations, in fractions of the image's width and height.
        raster_track: (seconds, raster or nothing) of a video, ascending: a mask or heat that
            changes; each holds until the next one's time, the last to the end of the region's.
        share: of a map row's target, beside the other regions of that row, > 0 (K8). None: 1, or if
            no region of the row has one, what they all cover is one target.
        weight: what the rows that it supervises count for, >= 0; 0: none are made (W1).
    """

    turn: int
    start: int
    stop: int
    image: int
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    polylines: tuple[Polygon, ...] = ()
    rasters: tuple[Raster, ...] = ()
    video: int | None = None
    time: tuple[float, float] | None = None
    tracks: tuple[Track, ...] = ()
    bells: tuple[Bell, ...] = ()
    raster_track: RasterTrack = ()
    share: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Word:
    """A word that is printed in an image.

    Args:
        text: the word.
        box: (x0, y0, x1, y1), in fractions of the image.
        image: the index of the image.
        weight: as of a `Region`.
    """

    text: str
    box: Box
    image: int
    weight: float = 1.0


@dataclass(frozen=True)
class Phrase:
    """A phrase of an answer.

    Args:
        turn: the index of an assistant message.
        start, stop: the characters of that message's text, `stop` exclusive.
        subject: (start, stop) of its head noun; None: not known.
        weight: as of a `Region`.
    """

    turn: int
    start: int
    stop: int
    subject: tuple[int, int] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class GroundedExample:
    """One training sample.

    Args:
        images: PIL images, in the order of their placeholders; the collator turns those that were
            opened and not touched since as their EXIF data asks (`pictures.upright_rgb`).
        messages: Hugging Face chat messages; `content` is a string or a list of
            `{"type": "image"}`, `{"type": "video"}` and `{"type": "text", "text": ...}` parts. The
            text of a message is the concatenation of its text parts. If no message has an image
            part, all images precede the text of the first user message, and so do all videos, if
            none has a video part. An assistant message with `"train": False` is context: nothing
            is learned from it, nor from regions and phrases of its text.
        regions: text spans and the places they speak of (SMAM, KLAL, margins, logit lens).
        words: words and their boxes (DV-SFT).
        phrases: phrases and their subjects (HIST).
        name: what error messages call this sample, for example `train.jsonl:17`.
        checked: whoever made it has checked its spans and places already.
        tools: JSON schemas of functions, for the chat template.
        videos: in the order of their placeholders.
        grounding_weight: multiplies the weights of all regions, words and phrases; not the text
            loss.
    """

    images: tuple[Image.Image, ...]
    messages: list[dict[str, Any]]
    regions: tuple[Region, ...] = ()
    words: tuple[Word, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    name: str = ""
    checked: bool = field(default=False, repr=False, compare=False)
    tools: tuple[dict[str, Any], ...] = ()
    videos: tuple[Video, ...] = ()
    grounding_weight: float = 1.0

    def chat(self) -> list[dict[str, Any]]:
        """The messages in one form: content is a list of parts, with one image part per image and
        one video part per video.

        Returns:
            New messages; those of the example stay as they are.
        """
        messages = [{**message, "content": _parts(message)} for message in self.messages]
        for message in messages:
            message.pop("train", None)
        written = {part["type"] for message in messages for part in message["content"]}
        counts = {"image": len(self.images), "video": len(self.videos)}
        missing = (kind for kind in counts if kind not in written)
        front = [{"type": kind} for kind in missing for _ in range(counts[kind])]
        users = (message for message in messages if message["role"] == "user")
        if (first := next(users, None)) is not None:
            first["content"] = front + first["content"]
        return messages

    def place(self, region: Region) -> int:
        """Which image of a batch a region is of.

        Args:
            region: one of this example.

        Returns:
            The index of its image, or of its video, which count behind the images.
        """
        return region.image if region.video is None else len(self.images) + region.video

    def weight_of(self, part: Region | Word | Phrase) -> float:
        """What the rows of a region, word or phrase count for.

        Args:
            part: one of this example.

        Returns:
            A number >= 0.

        Source: (W1).
        """
        return self.grounding_weight * part.weight

    def check(self) -> None:
        """Check that nothing refers to what is not there.

        Covers kinds of content parts, image parts per image, video parts per video, frames and
        their times; unless `checked`, turns, character spans, indices of images, coordinates, times
        of regions and weights too.

        Raises:
            ValueError: the message names this sample and the field.
        """
        name = self.name or "example"
        self._check_messages(name)
        for index, video in enumerate(self.videos):
            video.check(f"{name}: videos[{index}]")
        if self.checked:
            return
        self._check_weights(name)
        for index, region in enumerate(self.regions):
            where = f"{name}: regions[{index}]"
            self._check_span(where, region)
            self._check_region_place(where, region)
            lines = (*region.polygons, *region.polylines)
            middles = (bell[:2] for bell in region.bells)
            corners = [*region.points, *middles, *(point for line in lines for point in line)]
            inside = all(map(_on_image, corners))
            require(inside, where, "points within the image (0 to 1)", corners)
            long = all(len(p) >= 3 for p in region.polygons)
            require(long, where, "polygons of 3 points or more", "fewer")
            long = all(len(p) >= 2 for p in region.polylines)
            require(long, where, "polylines of 2 points or more", "fewer")
            spreads = [spread for bell in region.bells for spread in bell[2:]]
            require(all(map(_above_0, spreads)), f"{where}.bells", "spreads above 0", spreads)
            shared = region.share is None or _above_0(region.share)
            require(shared, f"{where}.share", "a number above 0 or None", region.share)
            checked = all(isinstance(raster, Raster) for raster in region.rasters)
            require(checked, f"{where}.rasters", "each a `Raster`", "something else")
        for index, word in enumerate(self.words):
            usable = isinstance(word.text, str) and _SURROGATE.search(word.text) is None
            require(usable, f"{name}: words[{index}].text", "Unicode text", repr(word.text))
            self._check_place(f"{name}: words[{index}]", word.image, (word.box,))
        for index, phrase in enumerate(self.phrases):
            self._check_span(f"{name}: phrases[{index}]", phrase)

    def _check_messages(self, name: str) -> None:
        require(len(self.messages) > 0, f"{name}: messages", "at least one message", "none")
        for index, message in enumerate(self.messages):
            where = f"{name}: messages[{index}]"
            require("role" in message, where, "a role", sorted(message))
            for part in _parts(message):
                kind, text = part.get("type"), part.get("text")
                known = kind in ("text", "image", "video")
                require(known, where, "text, image and video parts", kind)
                written = kind != "text" or isinstance(text, str)
                require(written, where, "text parts with a text", type(text).__name__)
                _check_text(where, text or "")
        parts = [part["type"] for message in self.chat() for part in message["content"]]
        for kind, count in (("image", len(self.images)), ("video", len(self.videos))):
            found, wanted = parts.count(kind), f"one {kind} part per {kind}, {count}"
            require(found == count, f"{name}: messages", wanted, found)

    def _check_weights(self, name: str) -> None:
        weights = {f"{name}: grounding_weight": self.grounding_weight}
        for kind in ("regions", "words", "phrases"):
            of = enumerate(getattr(self, kind))
            weights |= {f"{name}: {kind}[{i}].weight": part.weight for i, part in of}
        for where, weight in weights.items():
            fits, wanted = 0.0 <= weight <= LARGEST_WEIGHT, f"a number in [0, {LARGEST_WEIGHT:g}]"
            require(fits, where, wanted, weight)

    def _check_span(self, where: str, span: Region | Phrase) -> None:
        known = 0 <= span.turn < len(self.messages)
        role = self.messages[span.turn]["role"] if known else "no message"
        wanted, got = "the index of an assistant message", f"{span.turn} ({role})"
        require(role == "assistant", f"{where}.turn", wanted, got)
        text = message_text(self.messages[span.turn])
        fits = 0 <= span.start < span.stop <= len(text) and text[span.start : span.stop].strip()
        wanted = f"a span of visible characters of {text!r}"
        require(bool(fits), where, wanted, f"{span.start}:{span.stop}")

    def _check_region_place(self, where: str, region: Region) -> None:
        if region.video is None:
            for name in ("time", "tracks", "raster_track"):
                timed = bool(getattr(region, name))
                require(not timed, f"{where}.{name}", "a region of a video", "one of an image")
            self._check_place(where, region.image, region.boxes)
            return
        known, wanted = 0 <= region.video < len(self.videos), f"below {len(self.videos)}"
        require(known, f"{where}.video", wanted, region.video)
        if region.time is not None:
            check_time(f"{where}.time", region.time)
        check_tracks(f"{where}.tracks", region.tracks)
        check_raster_track(f"{where}.raster_track", region.raster_track)
        _check_boxes(where, (*region.boxes, *(box for track in region.tracks for _, box in track)))

    def _check_place(self, where: str, image: int, boxes: tuple[Box, ...]) -> None:
        require(0 <= image < len(self.images), f"{where}.image", f"below {len(self.images)}", image)
        _check_boxes(where, boxes)


def _check_boxes(where: str, boxes: tuple[Box, ...]) -> None:
    for x0, y0, x1, y1 in boxes:
        fits = x0 < x1 and y0 < y1 and _on_image((x0, y0)) and _on_image((x1, y1))
        wanted = "a box within the image, 0 <= x0 < x1 <= 1, y alike"
        require(fits, where, wanted, (x0, y0, x1, y1))


def message_text(message: dict[str, Any]) -> str:
    """The text that character spans of a message index: all its text parts, joined.

    Args:
        message: a chat message, its content a string or a list of parts.
    """
    return "".join(part["text"] for part in _parts(message) if part.get("type") == "text")


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message is an assistant's that is learned from.

    Args:
        message: a chat message.
    """
    return message["role"] == "assistant" and message.get("train", True)


def unusable(text: str) -> str | None:
    """The first character of `text` that no text may hold, as `U+0000`; None if there is none."""
    found = _UNUSABLE.search(text)
    return None if found is None else f"U+{ord(found[0]):04X}"


def _check_text(where: str, text: str) -> None:
    if character := unusable(text):
        fail(where, USABLE_TEXT, character)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content") or ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    visual = ("image", "video")
    return [{"type": p["type"]} if p.get("type") in visual else p for p in content]


def _above_0(value: float) -> bool:
    return 0 < value < float("inf")


def _on_image(point: Point) -> bool:
    return all(-1e-6 <= value <= 1.0 + 1e-6 for value in point)
