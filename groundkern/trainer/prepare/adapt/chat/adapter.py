"""Files of other fine-tuning programs: what is in a record says which dialect it is of.

Read are messages (role, content), conversations (from, value), TRL's prompt and completion,
ms-swift's query and response with `objects`, and Alpaca's instruction and output, as JSON arrays,
JSON lines, Parquet, Arrow and folders of `datasets`. The first records say whether a file is one;
each record is then read by its own shape, since files mix.

Images are in parts of messages, or in a field of the record with `<image>` in the texts, or before
everything. Every other field of a record is kept in `meta`. What cannot be kept (videos, structured
tool calls, reasoning apart from the answer) rejects the record.

Source: docs of LLaVA, Qwen-VL, LLaMA-Factory, ms-swift, TRL, axolotl, verl and OpenAI's API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.places.kinds import LOOKED_AT, Kinds
from groundkern.trainer.places.writing import PER_MILLE
from groundkern.trainer.prepare.adapt.chat import recognise
from groundkern.trainer.prepare.adapt.chat.dialects import Dialect, chosen, dialect_of
from groundkern.trainer.prepare.adapt.chat.files import first_records, open_records, unlike_json
from groundkern.trainer.prepare.adapt.chat.objects import Canvas, look, objects_of, placed
from groundkern.trainer.prepare.adapt.chat.pictures import (
    FIELDS,
    Picture,
    common_root,
    folder_of,
    picture,
    references,
)
from groundkern.trainer.prepare.adapt.chat.turns import Slot, Turn, turn_of
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.boxes.settings import Sized
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.sources import Item, Source
from groundkern.trainer.wording import short

PHRASING = None
OTHER_MEDIA = ("video", "videos", "audio", "audios")
SYSTEM = ("system", "system_prompt")
READ = {*FIELDS, *SYSTEM, *OTHER_MEDIA, "tools", "objects", "mask_history"}


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The records of a file.

    Raises:
        ConfigError: no record among the first is of a known dialect, or they are preferences and
            `take_chosen` is off.
    """
    records = first_records(options)
    kind = recognise.kind_of(records)
    if kind == "preference" and not options.take_chosen:
        raise ConfigError(
            f"{options.data}: a preference file (answers compared or judged); `prepare adapt chat "
            "--take-chosen` makes samples of the better ones"
        )
    if kind == "other":
        raise ConfigError(f"{options.data}: {_unlike(records, options)}")
    return open_records(options), _root(records, options)


def convert(item: Item, options: Options) -> Made:
    """One conversation, with a region for each box that its answers write.

    One that has regions or phrases of its own, or ms-swift's objects, keeps these and no others.
    """
    sample, pictures, counts = _sample(item, options)
    if not {"regions", "phrases"} & sample.keys():
        sizes = [found.size for found in pictures]
        sample, found = options.boxes(sample, sizes, item.where)
        counts |= found
    if isinstance(regions := sample.get("regions"), list):
        counts["regions"] = len(regions)
    written = {found.path: found.data for found in pictures if found.data is not None}
    return Made([sample], written, {name: n for name, n in counts.items() if n})


def warnings(source: Source, options: Options) -> list[str]:
    """What boxes in the first records say against how they are read, one sentence each."""

    unsaid = Kinds("pixel")  # what ms-swift's boxes are without `bbox_type`
    looked_at: list[Sized] = []
    for item in islice(source.read(), LOOKED_AT):
        with suppress(SampleError):
            if item.problem is None:
                sample, pictures, _ = _sample(item, options)
                sizes = [found.size for found in pictures]
                look(item.value.get("objects"), sizes, item.where, unsaid)
                if not {"regions", "phrases"} & sample.keys():
                    looked_at.append((sample, sizes, item.where))
    said = unsaid.warning("objects.bbox_type", {"unit": "norm1", "per_mille": "norm1000"})
    return [*options.boxes.warnings(looked_at), *([said] if said else [])]


def _sample(item: Item, options: Options) -> tuple[dict[str, Any], list[Picture], dict[str, int]]:
    """(a canonical record, its images, counts) of a record as it is."""
    where = item.where
    record = item.value
    if isinstance(record, dict):
        record = chosen(record, where, take=options.take_chosen)
    dialect = dialect_of(record)
    if dialect is None:
        known = isinstance(record, dict)
        got = f"an object with {recognise.fields_of(record)}" if known else short(record)
        raise SampleError(f"{where}: expected a chat of a known kind, got {got}")
    for name in OTHER_MEDIA:
        if record.get(name):
            raise wrong(where, name, "images and text only", name)
    turns = _framed(dialect.read(record, where), record, where)
    pictures = _pictures(turns, references(record, where), item, options)
    counts = {"fields_unread": sum(turn.unread for turn in turns)}
    regions: list[dict[str, Any]] = []
    if record.get("objects"):
        sizes = [found.size for found in pictures]
        writer = options.boxes.writer or PER_MILLE
        frame = Canvas(sizes, options.overhang, writer, where)
        turns, regions, found = placed(turns, objects_of(record["objects"], where), frame)
        counts |= found
    sample = {
        **_kept(record, dialect, where),
        "images": [found.path for found in pictures],
        "messages": [_message(turn) for turn in turns],
    }
    if regions and isinstance(given := sample.get("regions", []), list):
        sample["regions"] = [*given, *regions]
    return sample, pictures, counts


def _framed(turns: list[Turn], record: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns behind the record's system prompt; of `mask_history` the last answer is trained."""
    system = next((record[name] for name in SYSTEM if record.get(name)), None)
    if system is not None and not (turns and turns[0].role == "system"):
        turns = [turn_of("system", system, f"{where}: system"), *turns]
    if record.get("mask_history"):
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        for i in answers[:-1]:
            turns[i] = replace(turns[i], train=False)
    return turns


def _pictures(
    turns: Sequence[Turn], given: list[Any], item: Item, options: Options
) -> list[Picture]:
    """The images in the order of their slots, or in the record's order if there are no slots."""
    slots = [piece for turn in turns for piece in turn.pieces if isinstance(piece, Slot)]
    waiting = sum(slot.reference is None for slot in slots)
    if slots and waiting != len(given):
        wanted = f"{len(given)} placeholders, one for each of the record's images"
        raise wrong(item.where, "messages", wanted, waiting)
    rest = iter(given)
    named = [next(rest) if s.reference is None else s.reference for s in slots] if slots else given
    return [picture(ref, f"images[{i}]", i, item, options) for i, ref in enumerate(named)]


def _message(turn: Turn) -> dict[str, Any]:
    context = {} if turn.train else {"train": False}
    texts = [piece for piece in turn.pieces if isinstance(piece, str)]
    if len(texts) == len(turn.pieces):
        return {"role": turn.role, "content": "".join(texts), **context}
    parts = [
        {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"}
        for piece in turn.pieces
    ]
    return {"role": turn.role, "content": parts, **context}


def _kept(record: Mapping[str, Any], dialect: Dialect, where: str) -> dict[str, Any]:
    """The fields of a sample beside its chat: id, task, tools, supervision; the rest is `meta`."""
    kept: dict[str, Any] = {}
    if isinstance(record.get("id"), str | int) and not isinstance(record["id"], bool):
        kept["id"] = record["id"]
    if isinstance(record.get("task"), str):
        kept["task"] = record["task"]
    answers = record.get("answers")
    if answers and isinstance(answers, list) and all(a and isinstance(a, str) for a in answers):
        kept["answers"] = answers
    for name in recognise.SUPERVISION:
        given = record.get(name) not in (None, [])  # a weight of 0 is one
        if given and dialect.needs == ("messages",):
            kept[name] = record[name]
    if record.get("tools"):
        kept["tools"] = _tools(record["tools"], where)
    meta = dict(record["meta"]) if isinstance(record.get("meta"), dict) else {}
    read = {*kept, *READ, *dialect.needs, *dialect.also}
    for name, value in record.items():
        merged = name == "meta" and isinstance(value, dict)
        if name not in read and value is not None and not merged and _plain(value):
            meta[name] = value
    return {**kept, **({"meta": meta} if meta else {})}


def _tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """JSON schemas of functions, each an object or the text of one."""
    try:
        tools = plain_json(tools) if isinstance(tools, str) else tools
        found = [plain_json(t) if isinstance(t, str) else t for t in tools]
    except (TypeError, ValueError) as error:
        raise wrong(where, "tools", "a list of JSON schemas", short(str(error))) from None
    for i, tool in enumerate(found):
        if not isinstance(tool, dict):
            raise wrong(where, f"tools[{i}]", "an object", short(tool))
    return found


def _plain(value: Any) -> bool:
    """Whether a value is one that JSON can hold: no bytes, and no NaN, which an empty cell is."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _unlike(records: list[Any], options: Options) -> str:
    """One sentence on a file that is no chat."""
    if records or options.data.is_dir():
        return recognise.looks_like(records)
    problem = next((item.problem for item in open_records(options).read()), None)
    return unlike_json(options.data) or recognise.looks_like(records, problem)


def _root(records: Sequence[Any], options: Options) -> Path:
    """The folder that all image paths of the samples start from: the deepest that holds the
    `image_roots` and what the first records need, the folders of their files, and the output's of
    images that are inside records."""
    needed: dict[Path, None] = {}
    for record in records:
        for reference in _references(record, options):
            needed[folder_of(reference, options) or options.output] = None
    return common_root([*options.image_roots, *needed] or [options.output])


def _references(record: Any, options: Options) -> list[Any]:
    """What a record's images refer to; none of a record that cannot be used."""
    try:
        record = chosen(record, "", take=options.take_chosen)
        dialect = dialect_of(record)
        turns = dialect.read(record, "") if dialect is not None else []
        slots = [piece.reference for t in turns for piece in t.pieces if isinstance(piece, Slot)]
        return [*references(record, ""), *(slot for slot in slots if slot is not None)]
    except (SampleError, AttributeError):
        return []
