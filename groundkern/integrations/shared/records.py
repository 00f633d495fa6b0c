"""Regions, words and phrases that travel with a sample through another program, as JSON.

A program's data sets are tables and its batches lists of columns, so that what a sample supervises
is one text in one column until its batch is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from groundkern.hf import GroundedExample
from groundkern.integrations.shared.sequences import Picture
from groundkern.trainer.data.images import wrong
from groundkern.trainer.data.resolving import Resolver, Size
from groundkern.trainer.data.sample import validated
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.wording import short

COLUMN = "groundkern"
"""The column of a data set, and the key of a sample, that has the text."""

FIELDS = ("regions", "words", "phrases", "grounding_weight")
ANY_ANSWER = [{"role": "assistant", "content": ""}]  # a program's messages are of its own format
NOT_HERE = ("mask", "heat", "video", "time", "frame", "track")


def supervision_of(row: Mapping[str, Any], where: str = "a row") -> dict[str, Any]:
    """The fields of a row that are ours, which a table may have filled up with nulls.

    Args:
        row: of a data set, with some of `regions`, `words`, `phrases`, `grounding_weight`; lists,
            or JSON of them.
        where: what error messages call it.

    Raises:
        SampleError: a text that is no JSON.
    """
    found = {}
    for name in FIELDS:
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise wrong(where, name, "a list, or JSON of one", short(value)) from None
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
    given_fields = {name: record[name] for name in FIELDS if name in record}
    fields = validated({"messages": ANY_ANSWER, **given_fields}, where)
    resolve = Resolver(messages, tuple(sizes), where)
    for i, region in enumerate(fields.regions):
        for name in NOT_HERE:
            if getattr(region, name) is not None:
                wanted = "boxes, points, polygons and polylines of images"
                raise wrong(where, f"regions[{i}]", wanted, name)
    each = [resolve.regions(r, f"regions[{i}]") for i, r in enumerate(fields.regions)]
    pictures: Any = tuple(map(Picture, given))
    return GroundedExample(
        pictures,
        messages,
        tuple(region for parts in each for region in parts),
        tuple(resolve.word(w, f"words[{i}]") for i, w in enumerate(fields.words)),
        tuple(resolve.phrase(p, f"phrases[{i}]") for i, p in enumerate(fields.phrases)),
        name=where,
        checked=True,
        grounding_weight=fields.grounding_weight,
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
