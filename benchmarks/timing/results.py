"""Rows of results, one per contestant, and the CSV files that they are stored in.

A file has a header and a row per contestant; each row carries what was measured and where: device,
versions, commit, date. Lines before the header that start with "# left out: " name what was asked
for and not measured. `pandas.read_csv(path, comment="#")` reads them too.
"""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, object]
LEFT_OUT = "# left out: "
FIELDS = (
    "op",
    "problem",
    "shape",
    "dtype",
    "mode",
    "rows",
    "keys",
    "columns",
    "vocabulary",
    "swept",
    "contestant",
    "kind",
    "status",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "to_gemms_p20",
    "to_gemms_p50",
    "to_gemms_p80",
    "ours_over_this_p20",
    "ours_over_this_p50",
    "ours_over_this_p80",
    "peak_mib",
    "memory_counts",
    "floor_flops",
    "floor_bytes",
    "floor_ms",
    "percent_of_floor",
    "bandwidth",
    "matmul_rate",
    "load",
)
# Columns that stay text, though a commit or a version may look like a number.
TEXT = {
    *("stage", "op", "problem", "shape", "dtype", "mode", "swept", "contestant", "kind", "status"),
    *("device", "processor", "system", "python", "torch", "triton", "groundkern"),
    *("commit", "date"),
}


def write(path: Path, rows: list[Row], left_out: Iterable[str] = ()) -> None:
    """Writes rows, which all have the same columns, and the names of what was not measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"{LEFT_OUT}{name}\n" for name in left_out)
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows of a file, with numbers and booleans as such and None for an empty cell."""
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(line for line in file if not line.startswith("#"))
        return [{name: x if name in TEXT else _value(x) for name, x in r.items()} for r in table]


def left_out(path: Path) -> list[str]:
    """What the run of a file was asked for and did not measure."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(LEFT_OUT) for line in lines if line.startswith(LEFT_OUT)]


def _value(text: str) -> int | float | bool | str | None:
    """The value that was written as `text`. "nan" and "inf" stay text, as in the record of a
    GPU."""
    known = {"": None, "True": True, "False": False}
    if text in known:
        return known[text]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text


def failures(rows: list[Row]) -> list[str]:
    """Contestants that crashed or disagreed; unlike a refusal, someone has to look into them."""
    return [
        f"{r['problem']}/{r['dtype']}: {r['contestant']}: {r['status']}"
        for r in rows
        if str(r["status"]).startswith(("failed", "disagrees"))
    ]
