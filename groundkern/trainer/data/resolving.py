"""Spans of a sample to characters, its coordinates to fractions and its times to seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from groundkern.hf.data.example import Phrase, Region, Word, message_text
from groundkern.trainer.data.finding import difference, occurrences
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.data.record import (
    PhraseRecord,
    PlaceRecord,
    RegionRecord,
    SpanRecord,
    WordRecord,
)
from groundkern.trainer.data.videos import StoredVideo, check_end
from groundkern.trainer.wording import short

Size = tuple[int, int]
PLACES = ("box", "points", "polygon", "polyline", "mask", "heat")
SLACK = 1e-6  # of the image: a coordinate this far outside is a rounding error
NOWHERE = -1  # the image of a region that is on a video


class Canvas(NamedTuple):
    """What coordinates are on: an image, or the frames of a video."""

    kind: str
    index: int
    size: Size


class Resolver:
    """What a sample's regions, words and phrases are in its texts, images and videos.

    Args:
        messages: Hugging Face chat messages.
        sizes: (width, height) of each image, upright.
        where: what starts an error message.
        videos: whose headers were read.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]],
        sizes: tuple[Size, ...],
        where: str,
        videos: Sequence[StoredVideo] = (),
    ) -> None:
        self.sizes, self.where, self.videos = sizes, where, videos
        self.roles = [message["role"] for message in messages]
        self.texts = [message_text(message) for message in messages]
        self.answers = [i for i, role in enumerate(self.roles) if role == "assistant"]

    def regions(self, region: RegionRecord, field: str) -> tuple[Region, ...]:
        """One for each of its intervals of time, or one alone."""
        given = [k for k in PLACES if getattr(region, k) is not None]
        if self._is_of_video(region):
            return self._regions_of_video(region, given, field)
        if len(given) != 1:
            wanted = f"one of {', '.join(PLACES[:-1])} and {PLACES[-1]}"
            raise self._wrong(field, wanted, " and ".join(given) or "none")
        turn, start, stop = self._span(region, field)
        canvas = self._image(region, field)
        shape = self._shape(region, given[0], canvas, field)
        (share,) = self._shares(region, [None], field)
        options = {"share": share, "weight": region.weight}
        return (Region(turn, start, stop, canvas.index, **options, **shape),)

    def _is_of_video(self, region: RegionRecord) -> bool:
        """Whether a region says so, or there is nothing else that it could be of."""
        said = (region.video, region.time, region.frame, region.track)
        alone = bool(self.videos) and not self.sizes and region.image is None
        return alone or any(value is not None for value in said)

    def _regions_of_video(
        self, region: RegionRecord, given: list[str], field: str
    ) -> tuple[Region, ...]:
        if region.image is not None:
            raise self._wrong(field, "either `image` or what a video has", "both")
        timed = [k for k in ("time", "frame", "track") if getattr(region, k) is not None]
        if len(timed) > 1:
            raise self._wrong(field, "one of time, frame and track", " and ".join(timed))
        given = [*given, *(k for k in timed if k == "track")]
        if len(given) != 1 and (given or not timed):
            wanted = f"one of {', '.join(PLACES)} and track, or a time or frame alone"
            raise self._wrong(field, wanted, " and ".join(given) or "none")
        turn, start, stop = self._span(region, field)
        canvas = self._video(region, field)
        shape = self._shape(region, given[0], canvas, field) if given else {}
        times = self._times(region, canvas.index, field)
        place, weight = (turn, start, stop, NOWHERE), region.weight
        return tuple(
            Region(*place, video=canvas.index, time=time, share=share, weight=weight, **shape)
            for time, share in zip(times, self._shares(region, times, field), strict=True)
        )

    def _shape(self, region: RegionRecord, kind: str, canvas: Canvas, field: str) -> dict[str, Any]:
        """The field of a `Region` that its place goes into; none of a raster, which comes later."""
        if region.spread is not None and region.points is None:
            raise self._wrong(f"{field}.spread", "`points` that have it", kind)
        if region.box is not None:
            return {"boxes": (self._box(region.box, region, canvas, f"{field}.box"),)}
        if kind in ("mask", "heat"):
            return {}
        field = f"{field}.{kind}"
        if region.track is not None:
            return {"tracks": (self._track(region, canvas, field),)}
        if region.points is not None:
            points = self._points(region.points, region.coord, canvas, field)
            spread = self._spread(region, canvas, field.replace(".points", ".spread"))
            bells = spread and tuple((*point, *spread) for point in points)
            return {"bells": bells} if bells else {"points": points}
        if region.polyline is not None:
            line = self._points(region.polyline, region.coord, canvas, field)
            if len(set(line)) < 2:
                raise self._wrong(field, "a line with a length", list(region.polyline))
            return {"polylines": (line,)}
        corners = self._points(region.polygon, region.coord, canvas, field)
        following = zip(corners, corners[1:] + corners[:1], strict=True)
        if abs(sum(x * b - a * y for (x, y), (a, b) in following)) <= 1e-12:
            raise self._wrong(field, "a polygon with an area", list(region.polygon))
        return {"polygons": (corners,)}

    def _spread(
        self, region: RegionRecord, canvas: Canvas, field: str
    ) -> tuple[float, float] | None:
        """Standard deviations in fractions of width and height; None: points without a spread."""
        if region.spread is None:
            return None
        if len(region.spread) not in (1, 2):
            raise self._wrong(field, "a number, or [x, y]", list(region.spread))
        width, height = _whole(region.coord, canvas)
        across = region.spread[0] / width
        down = across * canvas.size[0] / canvas.size[1]  # a number alone: as many pixels as across
        if len(region.spread) == 2:
            down = region.spread[1] / height
        if across == down == 0:
            return None
        if not (0 < across <= 1 and 0 < down <= 1):
            wanted = f"numbers above 0, up to the {width} x {height} of the {canvas.kind}, or 0"
            raise self._wrong(field, wanted, list(region.spread))
        return across, down

    def _times(
        self, region: RegionRecord, video: int, field: str
    ) -> list[tuple[float, float] | None]:
        """The seconds that a region is of, the second of a pair exclusive; None: all."""
        if region.frame is not None:
            return [self.videos[video].moment(region.frame, f"{field}.frame")]
        if region.time is None:
            return [None]
        field, length = f"{field}.time", self.videos[video].duration
        several, before = isinstance(region.time, list), 0.0
        intervals = region.time if several else [region.time]
        for index, (start, stop) in enumerate(intervals):
            here = f"{field}[{index}]" if several else field
            if not 0 <= start < stop:
                wanted = "[t0, t1] in seconds, 0 <= t0 < t1"
                raise self._wrong(here, wanted, [start, stop])
            if start >= length:
                wanted = f"a time within the {length:.3f} s of the video"
                raise self._wrong(here, wanted, [start, stop])
            if start < before:
                wanted = f"intervals that ascend, from {before:g} s on"
                raise self._wrong(here, wanted, [start, stop])
            check_end(stop, length, self.where, here)
            before = stop
        return intervals

    def _shares(self, region: RegionRecord, times: list, field: str) -> list[float | None]:
        """The share of each interval: one number of several is divided by how long they are."""
        if region.share is None:
            return [None] * len(times)
        if len(region.share) == len(times):
            return list(region.share)
        if len(region.share) != 1:
            wanted = f"a number, or one for each of {len(times)} intervals"
            raise self._wrong(f"{field}.share", wanted, list(region.share))
        whole = sum(stop - start for start, stop in times)
        return [region.share[0] * (stop - start) / whole for start, stop in times]

    def _track(self, region: RegionRecord, canvas: Canvas, field: str) -> tuple:
        """A box at each of some times, which ascend."""
        track, video = [], self.videos[canvas.index]
        for index, moment in enumerate(region.track):
            here = f"{field}[{index}]"
            if (moment.time is None) == (moment.frame is None):
                got = "neither" if moment.time is None else "both"
                raise self._wrong(here, "either time or frame", got)
            time = moment.time
            if time is None:
                time = video.moment(moment.frame, f"{here}.frame")[0]
            check_end(time, video.duration, self.where, f"{here}.time")
            if track and time <= track[-1][0]:
                raise self._wrong(here, f"a time behind {track[-1][0]:g} s", f"{time:g}")
            track.append((time, self._box(moment.box, region, canvas, f"{here}.box")))
        return tuple(track)

    def word(self, word: WordRecord, field: str) -> Word:
        if not word.text.strip():
            raise self._wrong(f"{field}.text", "a word", short(word.text))
        canvas = self._image(word, field)
        box = self._box(word.box, word, canvas, f"{field}.box")
        return Word(word.text, box, canvas.index, word.weight)

    def phrase(self, phrase: PhraseRecord, field: str) -> Phrase:
        turn, start, stop = self._span(phrase, field)
        if phrase.subject is None:
            return Phrase(turn, start, stop, weight=phrase.weight)
        text = self.texts[turn][start:stop]
        found = occurrences(phrase.subject, text)
        if not found:
            wanted = f"words of the phrase {short(text)}"
            raise self._wrong(f"{field}.subject", wanted, _unfound(phrase.subject, text))
        subject = start + found[0][0], start + found[0][1]
        return Phrase(turn, start, stop, subject, phrase.weight)

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

    def _image(self, place: PlaceRecord, field: str) -> Canvas:
        return self._canvas("image", place.image, self.sizes, field)

    def _video(self, region: RegionRecord, field: str) -> Canvas:
        return self._canvas("video", region.video, [video.size for video in self.videos], field)

    def _canvas(self, kind: str, given: int | None, sizes: Sequence[Size], field: str) -> Canvas:
        """The image or video of an index, which may be left out where there is one."""
        field, count = f"{field}.{kind}", len(sizes)
        if given is None and count > 1:
            raise self._wrong(field, f"one of the {count} {kind}s, from 0", "none")
        index = given or 0
        if index >= count:
            raise self._wrong(field, f"an index of the sample's {count} {kind}s", index)
        return Canvas(kind, index, sizes[index])

    def _box(self, box: tuple, place: PlaceRecord, canvas: Canvas, field: str) -> tuple:
        x0, y0, x1, y1 = box
        self._refuse_fractions(box, place.coord, field, box)
        if place.order == "xywh":
            x1, y1 = x0 + x1, y0 + y1
        width, height = _whole(place.coord, canvas)
        left, top = x0 / width + 0.0, y0 / height + 0.0  # as a clamp does it: no -0.0
        right, bottom = x1 / width, y1 / height
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:  # nothing to clamp or to say
            return left, top, right, bottom
        wanted = "positive width and height" if place.order == "xywh" else "x0 < x1, y0 < y1"
        if not (x0 < x1 and y0 < y1):
            sizes = place.order == "xyxy" and min(box) >= 0 < min(box[2:])
            hint = ' ("order": "xywh" is for width and height)' if sizes else ""
            raise self._wrong(field, wanted, f"{list(box)}{hint}")
        low, high = self._points([(x0, y0), (x1, y1)], place.coord, canvas, field, box)
        if not (low[0] < high[0] and low[1] < high[1]):  # thinner than the rounding of SLACK
            raise self._wrong(field, wanted, list(box))
        return (*low, *high)

    def _points(self, points: list, coord: str, canvas: Canvas, field: str, got=None) -> tuple:
        """The points as fractions of the image; `got` is what the error shows, if not `points`."""
        width, height = _whole(coord, canvas)
        fractions = [(x / width, y / height) for x, y in points]
        if any(not -SLACK <= value <= 1 + SLACK for point in fractions for value in point):
            wanted = f"{coord} coordinates within {canvas.kind} {canvas.index}, {width} x {height}"
            largest = max(value for point in fractions for value in point)
            said = _other_unit(coord, largest, max(number for point in points for number in point))
            raise self._wrong(field, wanted, f"{list(got or points)}{said}")
        if got is None:
            self._refuse_fractions([number for p in points for number in p], coord, field, points)
        return tuple((min(1.0, max(0.0, x)), min(1.0, max(0.0, y))) for x, y in fractions)

    def _refuse_fractions(self, numbers: Sequence, coord: str, field: str, got: Sequence) -> None:
        """Refuse what would all lie in the image's first pixel, and is not whole pixels: fractions
        of the image, from which a run would learn nothing and say so nowhere."""
        if coord == "pixel" and max(numbers) <= 1 and any(x != int(x) for x in numbers):
            raise self._wrong(field, 'pixels, or "coord": "unit" for 0 to 1', list(got))

    def _wrong(self, field: str, wanted: str, got: object) -> SampleError:
        return wrong(self.where, field, wanted, got)


def _whole(coord: str, canvas: Canvas) -> Size:
    """Width and height of an image or video in a kind of coordinates."""
    if coord == "pixel":
        return canvas.size
    return (1000, 1000) if coord == "per_mille" else (1, 1)


def _other_unit(coord: str, fraction: float, number: float) -> str:
    """What pixels that leave their image may be, to say behind them; "" if nothing is likely: a few
    percent are an edge that was taken for a pixel's centre."""
    likely = coord == "pixel" and fraction > 1.05 and number <= 1000
    return ' ("coord": "per_mille" is for 0 to 1000)' if likely else ""


def _unfound(text: str, answer: str) -> str:
    why = difference(text, answer)
    return f"{short(text)}: {why}" if why else short(text)
