"""Rows of samples in JSON-lines files: appended as they come, read back if they are whole.

Every process of an evaluation has a file of its own. A last line that was cut off is no row; nor is
a line that does not have a row's fields, or whose sample is another one now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from groundkern.hf.watching.plain import finite_or_none
from groundkern.trainer import durable

Row = dict[str, Any]
_HASH = re.compile("[0-9a-f]{16}")
_LARGEST = 2.0**53  # of a sum or a count


def identity(line_hash: int) -> str:
    """A sample's identity: the hash of its line in hex, whatever file the line is in."""
    return f"{int(line_hash):016x}"


def read_rows(path: Path, fits: Callable[[Row], bool]) -> list[Row]:
    """The rows of a file, in its order; none if there is no file.

    Args:
        path: the file.
        fits: whether an object has a row's own fields.
    """
    return durable.read_rows(path, lambda row: _has_sample(row) and fits(row), "row of a sample")


def is_answer(row: Row) -> bool:
    """Whether a row has an answer, or why there is none."""
    if "error" in row:
        return isinstance(row["error"], str)
    return (
        isinstance(row.get("prediction"), str)
        and isinstance(row.get("raw", ""), str)
        and _texts(row.get("gold"))
        and _whole(row.get("tokens"))
        and isinstance(row.get("ended"), bool)
        and _size(row.get("resized", [1, 1]))
    )


def is_measured(row: Row) -> bool:
    """Whether a row has figures, or why there are none."""
    return isinstance(row["error"], str) if "error" in row else are_figures(row.get("figures"))


def lacks_gradcam(row: Row) -> bool:
    """Whether it was measured what the answer's tokens owe to the region, and GradCAM was not."""
    figures = row.get("figures", {})
    return "peak_in_mask" in figures and "gradcam_peak" not in figures


def is_prediction(row: Row) -> bool:
    """Whether a row is one of a finished evaluation's predictions."""
    return (
        isinstance(row.get("task"), str)
        and isinstance(row.get("prediction"), str)
        and _texts(row.get("gold"))
        and are_figures(row.get("figures"))
    )


def are_figures(value: Any) -> bool:
    """Whether a value is {name: [sum, count]} with finite sums and counts of 0 or more."""
    if not isinstance(value, dict):
        return False
    for pair in value.values():
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_number, pair)):
            return False
        if pair[1] < 0:
            return False
    return True


class Rows:
    """The file that this process appends rows to, a batch at a time.

    Args:
        path: the file; what an earlier process left of a last line is cut off.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                durable.write_bytes(path, content[:whole])

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows by one write, and flush them.

        Raises:
            StorageError: the disk refused; rows before these are there.
        """
        if rows:
            durable.append_line(self.path, "\n".join(map(line_of, rows)))
            durable.sync_file(self.path)


def line_of(row: Row) -> str:
    """A row as a line of strict JSON."""
    return json.dumps(finite_or_none(row), ensure_ascii=False, allow_nan=False)


def newest(rows: Iterator[Row], hashes: Sequence[str]) -> dict[int, Row]:
    """{sample: its row}, an answer before an error, and else the later before the earlier.

    Args:
        rows: of all processes.
        hashes: the identity of each sample now; a row of another one does not count.
    """
    found: dict[int, Row] = {}
    for row in rows:
        sample = row["sample"]
        known = sample < len(hashes) and hashes[sample] == row["hash"]
        if known and not ("error" in row and sample in found):
            found[sample] = row
    return found


def _has_sample(row: Row) -> bool:
    found = row.get("hash")
    return _whole(row.get("sample")) and isinstance(found, str) and bool(_HASH.fullmatch(found))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _size(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(_whole(side) and side > 0 for side in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and -_LARGEST <= value <= _LARGEST
