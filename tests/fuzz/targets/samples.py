"""Canonical samples: what is accepted is resolved rightly and is the same once more."""

from __future__ import annotations

import json
import math
import unicodedata
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from groundkern.hf.data.example import Region
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.rasters import HeatFile, Runs, Stored
from groundkern.trainer.data.sample import Sample, parse_sample
from groundkern.trainer.data.videos import StoredVideo
from groundkern.trainer.prepare.sources import json_lines
from tests.fuzz.scratch import SIZES, doubled, images, lines_of, written
from tests.fuzz.target import Target, expect

WHERE = "train.jsonl:7"
ANSWER = "The red patch, the blue patch and 65 % e\u0301."


def _record(**more: Any) -> bytes:
    question = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
    return json.dumps({"images": ["a.png"], "messages": messages, **more}).encode()


BOX = {"text": "red patch", "box": [1, 2, 20, 10.5]}
BOX_ALONE = {"box": BOX["box"]}
SEEDS = {
    "box": _record(regions=[BOX], task="boxes"),
    "occurrence": _record(regions=[{"text": "patch", "occurrence": 1, "points": [[3, 4], [5, 6]]}]),
    "polygon": _record(regions=[{"char_span": [4, 7], "polygon": [[0, 0], [9, 0], [9, 9]]}]),
    "polyline": _record(
        regions=[{"char_span": [0, 3], "polyline": [[0, 0], [0.5, 1]], "coord": "unit"}]
    ),
    "mask": _record(regions=[{"char_span": [0, 3], "mask": "labels.png", "mask_value": 2}]),
    "runs": _record(regions=[{"text": "red", "mask": {"size": [3, 4], "counts": [5, 4, 3]}}]),
    "packed": _record(regions=[{"text": "red", "mask": {"size": [3, 4], "counts": "1232O"}}]),
    "heat": _record(regions=[{"text": "red patch", "heat": "heat.npy"}]),
    "xywh": _record(
        regions=[{"text": "65 %", "box": [0, 0, 500, 1000], "coord": "per_mille", "order": "xywh"}]
    ),
    "words": _record(words=[{"text": "coal", "box": [0, 0, 4, 5]}]),
    "phrases": _record(
        phrases=[{"text": "The red patch, the"}, {"text": "red patch", "subject": "patch"}]
    ),
    "accents": _record(regions=[{"text": "e\u0301", "box": [1, 1, 3, 3]}]),
    "two": json.dumps(
        {
            "images": ["a.png", "turned.jpg"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}] * 2},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "b"},
            ],
            "regions": [{"turn": 4, "text": "b", "image": 1, "box": [0, 0, 24, 36]}],
        }
    ).encode(),
    "video": _record(
        videos=[{"path": "clip", "fps": 2, "frames": 3, "start": 0.5, "end": 2.5}],
        regions=[
            {"text": "red patch", "video": 0, "time": [0.5, 2], "box": [1, 2, 20, 10.5]},
            {"text": "patch", "frame": 4, "points": [[0.5, 1]], "coord": "unit"},
            {"text": "blue", "time": [0, 1.5]},
            {"text": "red", "track": [{"time": 0, "box": BOX["box"]}, {"frame": 2, **BOX_ALONE}]},
        ],
    ),
    "text": b'{"messages": [{"role": "assistant", "content": "hi"}]}',
}
PIECES = ("images", "messages", "regions", "words", "phrases", "role", "content", "text", "box")
PIECES += ("turn", "image", "occurrence", "char_span", "points", "polygon", "polyline", "subject")
PIECES += ("mask", "mask_value", "heat", "size", "counts", "a.png", "labels.png", "heat.npy")
PIECES += ("videos", "video", "clip", "path", "fps", "frames", "start", "end", "time", "frame")
PIECES += ("track",)
PIECES += ("assistant", "user", "system", "pixel", "unit", "per_mille", "xyxy", "xywh", "coord")


def check_sample(data: bytes) -> bool:
    """Parses a line; an accepted one is resolved to what it says and stable."""
    sample = parse_sample(data, root=images(), where=WHERE)
    name = doubled(data)
    expect(name is None, "a refusal of an object with a name twice", name)
    record = json.loads(data.decode("utf-8-sig"))
    _resolved(sample, record)
    again = parse_sample(canonical(sample), root=images(), where=WHERE)
    expect(again == sample, "the same sample when its normal form is read", sample, again)
    return True


def _resolved(sample: Sample, record: dict) -> None:
    for size, path in zip(sample.sizes, sample.images, strict=True):
        expect(SIZES.get(path.name, size) == size, "the image's size", size)
    texts = [text_of(message) for message in sample.messages]
    for kind in ("regions", "phrases"):
        found = getattr(sample, kind)
        for span, said in zip(found, record.get(kind, []), strict=True):
            text = texts[span.turn][span.start : span.stop]
            expect(bool(text.strip()), "a span of visible characters", span)
            expect(sample.messages[span.turn]["role"] == "assistant", "a turn of the model", span)
            if said.get("text") is not None:
                same = _plain(text) == _plain(said["text"])
                expect(same, f"the span of {said['text']!r}", text)
            if said.get("char_span") is not None:
                expect([span.start, span.stop] == said["char_span"], "the span given", span)
    rasters = [index for index, _ in sample.rasters]
    expect(len(rasters) == len(set(rasters)), "one raster for a region", rasters)
    for index, region in enumerate(sample.regions):
        kinds = (region.boxes, region.points, region.polygons, region.polylines, region.tracks)
        wanted = {0} if index in rasters else {0, 1} if region.time is not None else {1}
        expect(sum(map(bool, kinds)) in wanted, "one kind of place", region)
        _in_time(sample, region)
        lines = [*region.polygons, *region.polylines, region.points]
        corners = [point for line in lines for point in line]
        expect(all(0 <= v <= 1 for point in corners for v in point), "points inside", region)
    for box in [box for region in sample.regions for box in region.boxes] + [
        word.box for word in sample.words
    ]:
        x0, y0, x1, y1 = box
        expect(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "a box with an area, inside", box)
    for phrase in sample.phrases:
        if phrase.subject is not None:
            low, high = phrase.subject
            expect(phrase.start <= low < high <= phrase.stop, "a subject in its phrase", phrase)
    expect(all(word.text.strip() for word in sample.words), "words that are not blank", sample)


def _in_time(sample: Sample, region: Region) -> None:
    """A region is of an image or of a video, and of times that this has."""
    if region.video is None:
        expect(0 <= region.image < len(sample.images), "an image that is there", region)
        expect(region.time is None and not region.tracks, "no times of an image", region)
        return
    video = sample.videos[region.video]
    for start, stop in () if region.time is None else (region.time,):
        expect(0 <= start < stop and start < video.duration, "a time of the video", region)
    for track in region.tracks:
        times = [time for time, _ in track]
        expect(len(times) > 1 and times[0] >= 0, "a box at two times or more", region)
        expect(all(a < b for a, b in pairwise(times)), "times that ascend", region)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def text_of(message: dict) -> str:
    """A message's text, as spans count it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def canonical(sample: Sample) -> dict:
    """A sample as a record again: spans in characters, places in fractions."""
    root = images().resolve()
    places = {"boxes": "box", "points": "points", "polygons": "polygon", "polylines": "polyline"}
    regions, rasters = [], {index: _raster(stored, root) for index, stored in sample.rasters}
    for index, region in enumerate(sample.regions):
        record: dict[str, Any] = {"char_span": [region.start, region.stop], "turn": region.turn}
        record.update(rasters.get(index, {}))
        for many, one in places.items():
            for value in (getattr(region, many),) if many == "points" else getattr(region, many):
                if value:
                    record[one] = list(value)
        for track in region.tracks:
            record["track"] = [{"time": time, "box": list(box)} for time, box in track]
        of = {"image": region.image} if region.video is None else {"video": region.video}
        if region.time is not None:
            of["time"] = list(region.time)
        regions.append({**record, **of, "coord": "unit"})
    phrases = []
    for phrase in sample.phrases:
        record = {"char_span": [phrase.start, phrase.stop], "turn": phrase.turn}
        if phrase.subject is not None:
            text = text_of(sample.messages[phrase.turn])
            record["subject"] = text[slice(*phrase.subject)]
        phrases.append(record)
    words = [
        {"text": word.text, "box": list(word.box), "image": word.image, "coord": "unit"}
        for word in sample.words
    ]
    return {
        "task": sample.task,
        "images": [str(path.relative_to(root)) for path in sample.images],
        "videos": [_video(video, root) for video in sample.videos],
        "messages": sample.messages,
        "regions": regions,
        "words": words,
        "phrases": phrases,
    }


def _video(stored: StoredVideo, root: Path) -> dict[str, Any]:
    """A folder of frames as a record has it; decoded too, if only to be refused in a sentence."""
    with suppress(SampleError):
        video = stored.load()
        expect(0 < len(video.frames) <= stored.planned, "as many frames as planned", stored)
        expect({frame.size for frame in video.frames} == {stored.size}, "one size", stored)
        expect(all(stored.start - 1e-5 <= time for time in video.times), "none before", stored)
    record = {"path": str(stored.path.relative_to(root)), "fps": stored.fps, "start": stored.start}
    end = {} if stored.end == math.inf else {"end": stored.end}
    return {**record, **end, "frames": stored.most}


def _raster(stored: Stored, root: Path) -> dict[str, Any]:
    """A mask or heat as a record has it; decoded too, which is refused in a sentence at worst."""
    with suppress(SampleError):
        values = stored.load({}).values
        expect(values.dim() == 2 and bool(values.any()), "something inside", values.shape)
    if isinstance(stored, Runs):
        counts = np.frombuffer(stored.runs, np.int64).tolist()
        return {"mask": {"size": [stored.height, stored.width], "counts": counts}}
    path = str(stored.path.relative_to(root))
    if isinstance(stored, HeatFile):
        return {"heat": path}
    return {"mask": path, "mask_value": stored.value}


def check_lines(data: bytes) -> bool:
    """Every line that is not blank is an item or a problem, and each id is there once."""
    path = written("lines/in.jsonl", data)
    source = json_lines(path, max_line=1 << 14)
    items = list(source.read())
    expect(len(items) == source.total, "as many items as announced", len(items), source.total)
    wanted = list(lines_of(data))
    expect(len(items) == len(wanted), f"{len(wanted)} lines", len(items))
    ids = []
    for item, line in zip(items, wanted, strict=True):
        if item.problem is not None:
            from tests.fuzz.target import sentence

            sentence(item.problem)
            continue
        expect(isinstance(item.value, dict), "an object", item.value)
        expect(item.value == json.loads(line.decode("utf-8-sig")), "the line's value", line)
        expect(doubled(line) is None, "a refusal of a name that is there twice", line)
        if "id" in item.value:
            ids.append(ascii(item.value["id"]))
    expect(len(ids) == len(set(ids)), "ids that differ", ids)
    return all(item.problem is None for item in items)


def check_data_set(data: bytes) -> bool:
    """A training file: each line is a sample or bad, and each sample is its line's."""
    path = written("data/train.jsonl", data)
    found = JsonLinesDataset(path, root=images(), max_line=1 << 14, processes=1)
    wanted = list(lines_of(data))
    counted = len(found) + len(found.bad)
    expect(counted == len(wanted), f"{len(wanted)} samples and bad ones", counted)
    for i in range(len(found)):
        sample = found.sample(i)
        number = int(sample.where.rpartition(":")[2])
        line = data.split(b"\n")[number - 1]
        expect(sample == parse_sample(line, root=images(), where=sample.where), "its line's", i)
        same = len(sample.regions) == found.counts["regions"][i] and sample.task == found.tasks[i]
        expect(same, "its counts and task", i)
    return len(found) > 0


LINES = {
    "three": b"\n".join((SEEDS["box"], SEEDS["words"], SEEDS["text"])) + b"\n",
    "ids": b'{"id": 1}\n{"id": "1"}\r\n\n{"id": [1, {"a": null}]}',
}
TARGETS = (
    Target("sample", check_sample, SEEDS, "json", PIECES, share=3),
    Target("data_set", check_data_set, LINES, "jsonl", PIECES),
    Target("json_lines", check_lines, LINES, "jsonl", (*PIECES, "id"), share=2),
)
