"""Several samples in one row: documents that attention keeps apart.

A packed row is the tokens of its documents, one behind the other. Position ids start again at each
document and there is no attention mask, which is how transformers and FlashAttention know where
one ends; padding behind the last document is one more document. What supervises a document moves
with it: rows by its tokens, image numbers by the images before it, and so on (`Values.counts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern.hf.data.batch import FIELDS, VALUES, Field
from groundkern.hf.data.padding import SampleFields, with_weights
from groundkern.hf.data.tokens import TokenRows


def rows_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share documents out to rows: the longest first, each into the fullest row that has room.

    Then the rows are evened out: bisection finds a smaller capacity that takes no more rows, so
    that less is padded. The same lengths always give the same rows.

    Args:
        lengths: the tokens of each document.
        capacity: of a row; no document is longer.

    Returns:
        The documents of each row, ascending; rows are in the order of their first documents.

    Source: best-fit decreasing; bisection as in MULTIFIT (Coffman, Garey and Johnson, 1978).
    """
    rows = _best_fit(lengths, capacity)
    low = max(max(lengths), -(-sum(lengths) // len(rows)))
    high = max(sum(lengths[i] for i in row) for row in rows)
    while low < high:
        middle = (low + high) // 2
        evener = _best_fit(lengths, middle)
        if len(evener) <= len(rows):
            rows, high = evener, max(sum(lengths[i] for i in row) for row in evener)
        else:
            low = middle + 1
    return sorted(map(sorted, rows))


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        fits = [row for row in range(len(rows)) if room[row] >= length]
        if fits:
            row = min(fits, key=room.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(document)
        room[row] -= length
    return rows


def join_tokens(documents: TokenRows, rows: Sequence[Sequence[int]]) -> TokenRows:
    """What runs along with the tokens, row by row.

    Args:
        documents: by name, for each document, a value for each of its tokens.
        rows: the documents of each row.

    Returns:
        By name, for each row, the values of all its documents; `position_ids`, which start again at
        each document and at the padding behind the last; no `attention_mask`.
    """
    joined = {
        name: [[x for i in row for x in values[i]] for row in rows]
        for name, values in documents.items()
        if name != "attention_mask"
    }
    lengths = [[len(documents["input_ids"][i]) for i in row] for row in rows]
    longest = max(map(sum, lengths))
    joined["position_ids"] = [
        [position for length in (*own, longest - sum(own)) for position in range(length)]
        for own in lengths
    ]
    return joined


def join_fields(
    documents: Sequence[SampleFields], lengths: Sequence[int], images: Sequence[int]
) -> SampleFields:
    """What a row of several documents supervises.

    Args:
        documents: the fields of each, whose positions count its own tokens from 0.
        lengths: the tokens of each.
        images: the images of each.

    Returns:
        The fields of the row.
    """
    documents = [with_weights(document) for document in documents]
    starts = dict.fromkeys(("S", "I", "G", "P", "C", "Rw"), 0)
    joined: SampleFields = {name: [] for document in documents for name in document}
    whole = {"S": sum(lengths), "C": sum(len(each.get("map_columns", ())) for each in documents)}
    for document, length, count in zip(documents, lengths, images, strict=True):
        own = {"S": length, "I": count, "C": len(document.get("map_columns", ()))}
        own["G"] = len(document.get("side_inside", ()))
        own["Rw"] = len(document.get("word_position", ()))
        own["P"] = 1 + max(map(int, document.get("phrase_number", ())), default=-1)
        for name in joined:
            joined[name] += _moved(name, document.get(name, ()), starts, own, whole)
        starts = {dim: start + own[dim] for dim, start in starts.items()}
    return joined


def _moved(
    name: str,
    values: Tensor | Sequence[Any],
    starts: dict[str, int],
    own: dict[str, int],
    whole: dict[str, int],
) -> list[Any]:
    """The rows of one document's field, as they are in the whole row."""
    spec = FIELDS[name]
    first, *inner = spec.dims.split()[1:]
    flat = isinstance(values, Tensor) and not inner
    rows: list[Any] = values.tolist() if isinstance(values, Tensor) and flat else list(values)
    if first in own and first != "C":  # a document without values has its places all the same
        rows += [[] if inner else spec.padding] * (own[first] - len(rows))
    if inner and inner[0] in whole:  # [.., S] and [.., C]: a row among those of all documents
        return [_among(row, starts[inner[0]], whole[inner[0]], spec) for row in rows]
    counts = VALUES[spec.values].counts
    return rows if counts is None else _shifted(rows, starts[counts])


def _among(row: Tensor | Sequence[Any], start: int, length: int, spec: Field) -> Tensor:
    out = torch.full((length,), spec.padding, dtype=spec.dtype)
    out[start : start + len(row)] = torch.as_tensor(row, dtype=spec.dtype)
    return out


def _shifted(rows: list[Any], by: int) -> list[Any]:
    if rows and isinstance(rows[0], (list, tuple)):
        return [_shifted(list(row), by) for row in rows]
    return [value + by if value >= 0 else value for value in rows]
