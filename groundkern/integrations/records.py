"""Regions, words and phrases that travel with a sample through another program, as JSON.

A program's data sets are tables and its batches lists of columns, so that what a sample supervises
is one text in one column until its batch is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from groundkern.hf import GroundedExample
from groundkern.integrations.sequences import Picture
from groundkern.trainer.data.images import wrong
from groundkern.trainer.data.record import PhraseRecord, RegionRecord, Weight, WordRecord
from groundkern.trainer.data.resolving import Resolver, Size
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.wording import short

COLUMN = "groundkern"
"""The column of a data set, and the key of a sample, that has the text."""

FIELDS: dict[str, type[BaseModel]] = {
    "regions": RegionRecord,
    "words": WordRecord,
    "phrases": PhraseRecord,
}
NOT_HERE = ("mask", "heat", "video", "time", "frame", "track")


def supervision_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that are ours, which a table may have filled up with nulls.

    Args:
        row: of a data set, with some of `regions`, `words`, `phrases`, `grounding_weight`; lists,
            or JSON of them.
    """
    found = {}
    for name in (*FIELDS, "grounding_weight"):
        value = row.get(name)
        value = json.loads(value) if isinstance(value, str) else value
        if value is not None and value != []:
            found[name] = without_nulls(value)
    return found


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def grounded_example(
    record: Mapping[str, Any], sizes: Sequence[Size], given: Sequence[Size], where: str
) -> GroundedExample:
    """The example of a record.

    Args:
        record: `messages` of role and content, and what `supervision_of` returns.
        sizes: (width, height) of the images as the program loads them, in which pixels count.
        given: the same of what the processor was given.
        where: what error messages call the sample.

    Raises:
        SampleError: a field that is unknown or does not fit, by name.
    """
    messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    resolve = Resolver(messages, tuple(sizes), where)
    made: dict[str, tuple[Any, ...]] = {}
    for name, kind in FIELDS.items():
        each = [_record(kind, r, f"{name}[{i}]", where) for i, r in enumerate(record.get(name, ()))]
        for i, one in enumerate(each):
            for field in NOT_HERE:
                if getattr(one, field, None) is not None:
                    wanted = "boxes, points, polygons and polylines of images"
                    raise wrong(where, f"{name}[{i}]", wanted, field)
        resolver = {"regions": resolve.regions, "words": resolve.word, "phrases": resolve.phrase}
        found = [resolver[name](one, f"{name}[{i}]") for i, one in enumerate(each)]
        made[name] = tuple(x for one in found for x in one) if name == "regions" else tuple(found)
    weight = record.get("grounding_weight", 1.0)
    try:
        weight = TypeAdapter(Weight).validate_python(weight)
    except ValidationError:
        raise wrong(where, "grounding_weight", "a number >= 0", short(weight)) from None
    pictures: Any = tuple(map(Picture, given))
    return GroundedExample(
        pictures, messages, name=where, checked=True, grounding_weight=weight, **made
    )


def with_boxes(
    record: Mapping[str, Any], sizes: Sequence[Size], where: str, boxes: BoxSettings
) -> Mapping[str, Any]:
    """A record with a region for each box in its answers, unless it has regions of its own.

    Args:
        record: as `grounded_example` takes it.
        sizes: (width, height) of its images as the program loads them.
        where: what error messages call the sample.
        boxes: how boxes are read.
    """
    if {"regions", "phrases"} & record.keys() or not sizes:
        return record
    return boxes(record, sizes, where)[0]


def _record(kind: type[BaseModel], value: Any, field: str, where: str) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        inner = ".".join(map(str, first["loc"]))
        wanted = first["msg"].removeprefix("Input should be ")
        if first["type"] == "extra_forbidden":
            wanted = f"one of {', '.join(kind.model_fields)}"
            raise wrong(where, field, wanted, inner) from None
        raise wrong(where, f"{field}.{inner}", wanted, short(first["input"])) from None
