"""Several samples in one row: documents that attention keeps apart.

A packed row is the tokens of its documents, one behind the other. Position ids start again at each
document and there is no attention mask, which is how transformers and FlashAttention know where
one ends; padding behind the last document is one more document. What supervises a document moves
with it: rows by its tokens, image numbers by the images before it, and so on (`Values.counts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from groundkern.hf.data.batch import FIELDS, VALUES
from groundkern.hf.data.padding import SampleFields


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
    values: Tensor | Sequence,
    starts: dict[str, int],
    own: dict[str, int],
    whole: dict[str, int],
) -> list:
    """The rows of one document's field, as they are in the whole row."""
    spec = FIELDS[name]
    rows = values.tolist() if isinstance(values, Tensor) else [_plain(row) for row in values]
    first, *inner = spec.dims.split()[1:]
    if first in own and first != "C":  # a document without values has its places all the same
        rows += [[] if inner else spec.padding] * (own[first] - len(rows))
    if (counts := VALUES[spec.values].counts) is not None:
        rows = _shifted(rows, starts[counts])
    if inner and inner[0] in whole:  # [.., S] and [.., C]: a row among those of all documents
        dim = inner[0]
        before, behind = starts[dim], whole[dim] - starts[dim]
        blank = [spec.padding]
        rows = [blank * before + row + blank * (behind - len(row)) for row in rows]
    return rows


def _shifted(rows: list, by: int) -> list:
    if rows and isinstance(rows[0], list):
        return [_shifted(row, by) for row in rows]
    return [value + by if value >= 0 else value for value in rows]


def _plain(row: object) -> object:
    return row.tolist() if isinstance(row, Tensor) else row
