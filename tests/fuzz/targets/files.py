"""Annotation files: JSON arrays against Python's own reader, pickles, tables of rows."""

from __future__ import annotations

import io
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

from groundkern.trainer.prepare.adapt.common import Options, tables
from groundkern.trainer.prepare.reading import Table, json_array, plain_pickle
from groundkern.trainer.prepare.sources import Unusable
from tests.fuzz.mutating import Pairs, dump, tree
from tests.fuzz.scratch import doubled, written
from tests.fuzz.target import Target, expect

ARRAYS = {
    "array": b'[{"a": 1}, {"b": [1.5, null]}, "\\u00e9", 12345678901234567890]',
    "data": b'{"version": "1", "other": [1, 2], "data": [{"q": "x"}, {"q": "y"}], "more": {}}',
    "empty": b'{"data": []}',
}


def check_array(data: bytes) -> bool:
    """The same elements as `json.loads`; what that refuses is refused."""
    path = written("files/array.json", data)
    found = list(json_array(path, "data"))
    usable = [each for each in found if not isinstance(each, Unusable)]
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        expect("integer string" in str(error), "a refusal of what is no JSON", error)
        return True
    wanted = value.get("data") if isinstance(value, dict) else value
    expect(isinstance(wanted, list), "a refusal of what is no array", value)
    expect(len(found) == len(wanted), f"{len(wanted)} elements", len(found))
    if doubled(dump(_element_tree(data)).encode("utf-8", "surrogatepass")) is None:
        same = repr(usable) == repr(wanted)  # NaN differs from itself
        expect(same, "the elements of json.loads", usable, wanted)
    else:
        expect(len(usable) < len(found), "a refusal of a name that is there twice", found)
    return len(usable) == len(found)


def _element_tree(data: bytes) -> list:
    """The array with its objects as pairs."""
    found = tree(data.removeprefix(b"\xef\xbb\xbf"))
    if isinstance(found, Pairs):
        found = next(value for name, value in found if name == "data")
    return found if isinstance(found, list) else []


@cache
def _pickles() -> dict[str, bytes]:
    refs = [{"ref_id": 1, "ann_id": 2, "sentences": [{"sent": "a man"}], "split": "val"}]
    return {f"protocol {n}": pickle.dumps(refs, protocol=n) for n in (0, 2, 4)} | {
        "set": pickle.dumps([{1, 2}, frozenset("ab")], protocol=2)
    }


def check_pickle(data: bytes) -> bool:
    """Plain values or one sentence; nothing is imported or called."""
    found = plain_pickle(written("files/refs.p", data))
    _plain(found)
    return True


def _plain(value: Any, depth: int = 0) -> None:
    kinds = (dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex)
    kinds = (*kinds, bool, type(None), type)
    expect(isinstance(value, kinds), "a plain value", type(value))
    if isinstance(value, type):
        expect(value in (set, frozenset), "no class but set and frozenset", value)
    if depth < 5 and isinstance(value, list | tuple):
        for each in value[:5]:
            _plain(each, depth + 1)


@cache
def _tables() -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    rows = {"question": ["a", "b"], "answers": [["x"], ["y", "z"]], "n": [1, 2]}
    table = pyarrow.table(rows)
    first, second = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, first)
    parquet.write_table(table, second, compression="none", use_dictionary=False)
    return {"dictionary": first.getvalue(), "plain": second.getvalue()}


def check_table(data: bytes) -> bool:
    """Rows of a Parquet file, or one sentence."""
    path = written("files/rows.parquet", data)
    source = tables(Options(Path(path)))
    rows = list(source.read())
    expect(len(rows) == source.total, "as many rows as announced", len(rows), source.total)
    return True


def check_join(data: bytes) -> bool:
    """Keys and values of a `Table` come back as they were added."""
    try:
        pairs = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(pairs, list):
        return False
    table, wanted = Table(), {}
    for pair in pairs:
        key, value = (pair, 1) if not isinstance(pair, list) or len(pair) != 2 else pair
        try:
            table.add(key, value)
        except RecursionError:
            return False
        wanted.setdefault(json.dumps(key), []).append(value)
    found = {json.dumps(key): values for key, values in table.groups()}
    expect(repr(found) == repr(wanted), "keys and values as they were added", found, wanted)
    for key, values in wanted.items():
        expect(repr(table.get(json.loads(key))) == repr(values), "the values of a key", key)
    return True


JOINS = {"pairs": b'[[1, "a.png"], ["1", "b.png"], [1, null], [[1, "x"], {"box": [0, 0, 1, 1]}]]'}
TARGETS = (
    Target("json_array", check_array, ARRAYS, "json", ("data",), share=3),
    Target("pickle", check_pickle, _pickles(), "bytes", share=2),
    Target("parquet", check_table, _tables(), "bytes", share=0.5),
    Target("join", check_join, JOINS, "json", share=0.5),
)
