"""What the `gk_` tensors of a batch say of one sample, whatever numbers they say it with.

Tokens count from the sample's first one, images and phrases in the order in which they appear, and
a row has with it all that it points to. So a document of a packed row and the same sample alone
mean the same, and nothing of how they were joined is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def meaning(batch: Mapping[str, Tensor], b: int, start: int, stop: int) -> dict[str, Any]:
    """What the tokens `start:stop` of row `b` supervise."""
    x = {name.removeprefix("gk_"): t[b] for name, t in batch.items() if name.startswith("gk_")}
    image = x["image"][start:stop].tolist()
    images = list(dict.fromkeys(i for i in image if i >= 0))
    image_of = x["image"][x["contrast_position"].clamp(min=0)].tolist()
    return {
        "image": [images.index(i) if i >= 0 else None for i in image],
        "bags": _bags(x["word_bag"], images),
        "text": _rows(x, "text_position", start, stop),
        "side": _side_rows(x, start, stop),
        "words": _word_rows(x, start, stop),
        "maps": _map_rows(x, start, stop, images),
        "columns": [c - start for c in _live(x["map_columns"]) if start <= c < stop],
        "phrases": _phrases(x, start, stop),
        "lens": [
            (position - start, int(x["lens_label"][r]), int(x["lens_inside"][r]))
            for r, position in _within(x["lens_position"], start, stop)
        ],
        "contrast": [
            (position - start, _live(x["contrast_label"][r]), _live(x["contrast_bag"][image_of[r]]))
            for r, position in _within(x["contrast_position"], start, stop)
        ],
    }


def supervised_rows(batch: Mapping[str, Tensor]) -> int:
    """How many rows of all kinds a batch has."""
    names = [name for name in batch if name.startswith("gk_") and name.endswith("_position")]
    return sum(int((batch[name] >= 0).sum()) for name in names if name != "gk_map_token_position")


_LISTS = ("text", "side", "words", "maps", "lens", "contrast")


def meant_rows(found: Mapping[str, Any]) -> int:
    """How many rows `meaning` told of."""
    phrases = sum(len(rows) for rows in found["phrases"][0])
    return phrases + sum(len(found[name]) for name in _LISTS)


def _live(x: Tensor) -> list[int]:
    return x[x >= 0].tolist()


def _within(positions: Tensor, start: int, stop: int) -> list[tuple[int, int]]:
    return [(r, p) for r, p in enumerate(positions.tolist()) if start <= p < stop]


def _bags(bags: Tensor, images: list[int]) -> dict[int, list[int]]:
    """The labels of each image that has some."""
    found = {number: _live(bags[i]) for number, i in enumerate(images) if i < len(bags)}
    return {number: bag for number, bag in found.items() if bag}


def _rows(x: Mapping[str, Tensor], name: str, start: int, stop: int) -> list[int]:
    return [position - start for _, position in _within(x[name], start, stop)]


def _side_rows(x: Mapping[str, Tensor], start: int, stop: int) -> list:
    found = []
    for r, position in _within(x["side_position"], start, stop):
        number = int(x["side_set"][r])
        seen = None
        if number >= 0:
            inside = x["side_inside"][number].nonzero()[:, 0].tolist()
            seen = [token - start for token in inside]
        found.append((position - start, seen))
    return found


def _word_rows(x: Mapping[str, Tensor], start: int, stop: int) -> list:
    found = []
    for r, position in _within(x["word_position"], start, stop):
        several, weights = x["several_label"], x["several_weight"]
        more = (_live(several[r]), _live(weights[r])) if several.shape[0] else ([], [])
        found.append((position - start, int(x["word_label"][r]), *more))
    return found


def _map_rows(x: Mapping[str, Tensor], start: int, stop: int, images: list[int]) -> list:
    found, columns = [], x["map_columns"].tolist()
    for r, position in _within(x["map_position"], start, stop):
        own = int(x["map_token_position"][r]) - start
        target = zip(columns, x["map_target"][r].tolist())
        there = {column - start: value for column, value in target if value > 0}
        found.append((position - start, own, images.index(int(x["map_image"][r])), there))
    return found


def _phrases(x: Mapping[str, Tensor], start: int, stop: int) -> tuple[list, list]:
    """The rows of each phrase, and the composites by the rows of their three phrases."""
    rows: dict[int, list] = {}
    for r, position in _within(x["phrase_position"], start, stop):
        row = position - start, int(x["phrase_subject"][r])
        rows.setdefault(int(x["phrase_number"][r]), []).append(row)
    threes = [three for three in x["phrase_composite"].tolist() if three[0] in rows]
    return list(rows.values()), [[rows[number] for number in three] for three in threes]


def same_tensors(one: Mapping[str, Any], other: Mapping[str, Any], names: list[str]) -> None:
    """Assert that two batches have the same bits under some names."""
    for name in names:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
