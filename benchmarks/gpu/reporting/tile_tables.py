"""The sweep's proposals, put into the tile tables of the Triton kernels' sources.

Only rows of TILES change; a person reads the difference and commits it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.lines import Line
from benchmarks.gpu.reporting.sessions import Session, number

OPS = Path(__file__).parents[3] / "groundkern" / "ops"
FILES = {op: OPS / op / "triton_launch.py" for op in ("side_attention", "attention_map")}
WIDTH = 100  # characters of a line
MASK_BITS = 32  # keys whose mask bits one integer holds; a tile has whole integers
ABOVE = re.compile(r"\s*# .*, \d{4}-\d\d-\d\d: .* us")  # of a row, if there is no room beside it
MAKERS = re.compile(r"nvidia|amd|instinct|\d+gb|hbm\d\w*|sxm\d*", re.IGNORECASE)


class Refused(Exception):
    """Why nothing is written."""


@dataclass(frozen=True)
class Proposal:
    """A row of a tile table, and the buckets of packed rows that were timed for it, usually one.

    Of each bucket: its key, its tile until now, microseconds with the proposed tile and with that
    one.
    """

    op: str
    key: tuple
    tile: tuple
    origin: str
    buckets: tuple[tuple, ...]
    presents: tuple[tuple, ...]
    us: tuple[float, ...]
    before: tuple[float, ...]

    @property
    def reason(self) -> str:
        if set(self.presents) == {self.tile}:
            return f"{self.origin}: unchanged at {_span(self.before)} us"
        return f"{self.origin}: {_span(self.us)} us, {_span(self.before)} us before"


def card(device: str) -> str:
    """`H200` of "NVIDIA H200", `H100` of "NVIDIA H100 80GB HBM3", `H100 PCIe` of the slower
    card."""
    return " ".join(x for x in re.split(r"[\s-]+", device) if not MAKERS.fullmatch(x))


def key_of(key: Sequence) -> tuple:
    """The table's key, from [kernel or null, wide, dim, packed rows or null]."""
    return tuple(x for x in key if x is not None)


def written(tile: Sequence) -> str:
    """A tile as the table writes it, without defaults."""
    values = list(tile)
    if values[4:] == [None]:
        values = values[:4] if values[3] != 2 else values[:3]
    return f"Tile({', '.join(map(str, values))})"


def _span(times: tuple[float, ...]) -> str:
    low, high = f"{min(times):.1f}", f"{max(times):.1f}"
    return low if low == high else f"{low} to {high}"


def forbidden(tile: Sequence) -> str | None:
    """Why Triton or `make aot` would reject a tile; None if they accept it."""
    sizes = list(tile)
    if len(sizes) != 5 or not all(type(x) is int and x > 0 for x in sizes[:4]):
        return "expected block_m, block_n, warps, stages, registers"
    m, n, warps, _, registers = sizes
    if any(x & (x - 1) for x in (m, n, warps)):
        return "block sizes and warps have to be powers of two"
    if m < 16 or n % MASK_BITS:
        return f"expected 16 rows or more and a multiple of {MASK_BITS} keys"
    if registers is not None and (type(registers) is not int or not 24 <= registers <= 255):
        return f"no thread has {registers} registers"
    return None


def proposals(sessions: list[Session]) -> list[Proposal]:
    """A row per measured bucket, or one for all of a kernel's if they agree.

    Raises:
        Refused: rehearsed, of an unknown commit, of two devices, or a tile that cannot be.
    """
    swept = [s for s in sessions if s.of("best")]
    if len(swept) > 1:
        raise Refused("tiles of two devices or commits: name the files of one")
    if not swept:
        raise Refused("no sweep of tiles came to a proposal here")
    if reasons := swept[0].refusals():
        raise Refused("\n".join(reasons))
    buckets: dict[tuple, list[Proposal]] = {}
    for call in swept[0].calls:
        origin = f"{card(call.card)}, {call.date[:10]}"
        for line in call.of("best"):
            new = _proposal(line, origin)
            kind = (new.op, tuple(line["key"][:3]))
            others = [p for p in buckets.get(kind, []) if p.key != new.key]
            buckets[kind] = [*others, new]
    return [row for some in buckets.values() for row in _joined(some)]


def _proposal(line: Line, origin: str) -> Proposal:
    tile, present = tuple(line["tile"]), tuple(line["present_tile"])
    us, before = number(line["us"]), number(line["present_us"])
    where = f"{line['op']} {line['key']}: {written(tile)}"
    if why := forbidden(tile):
        raise Refused(f"{where}: {why}")
    if line["op"] not in FILES or len(line["key"]) != 4:
        raise Refused(f"{where}: no such table or row")
    if us is None or before is None:
        raise Refused(f"{where}: without a time")
    key = key_of(line["key"])
    return Proposal(line["op"], key, tile, origin, (key,), (present,), (us,), (before,))


def _lead(key: tuple) -> tuple:
    """The key of the row for all packed rows: ([kernel,] wide, dim)."""
    return key[: 2 + isinstance(key[0], str)]


def _joined(some: list[Proposal]) -> list[Proposal]:
    """One row for all packed rows, if every measured bucket has the same tile and the table has
    such a row: side attention's "backward" serves only so many."""
    known = table(FILES[some[0].op].read_text(encoding="utf-8"))
    if len(some) < 2 or len({p.tile for p in some}) > 1 or _lead(some[0].key) not in known:
        return some
    names = ("buckets", "presents", "us", "before")
    all_of = {name: tuple(x for p in some for x in getattr(p, name)) for name in names}
    return [replace(some[-1], key=_lead(some[0].key), **all_of)]


@dataclass(frozen=True)
class _Row:
    """A row of a table in a source: its tile, and its lines, from first up to end."""

    tile: tuple
    first: int
    end: int


def table(source: str) -> dict[tuple, _Row]:
    """The rows of TILES."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        if [getattr(x, "id", None) for x in node.targets] != ["TILES"]:
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            sizes = [ast.literal_eval(x) for x in value.args]
            tile = (*sizes, *(2, None)[len(sizes) - 3 :])
            first = key.lineno - 1 - bool(ABOVE.match(lines[key.lineno - 2]))
            found[ast.literal_eval(key)] = _Row(tile, first, value.end_lineno)
    return found


def _lines_of(row: Proposal) -> list[str]:
    keys = ", ".join(f'"{x}"' if isinstance(x, str) else repr(x) for x in row.key)
    text = f"    ({keys}): {written(row.tile)},"
    beside = f"{text}  # {row.reason}"
    return [beside] if len(beside) <= WIDTH else [f"    # {row.reason}", text]


def rewritten(source: str, some: list[Proposal]) -> tuple[str, list[str]]:
    """(the source with the rows in its table, what was not changed and why)."""
    rows, left = table(source), []
    edits: list[tuple[int, int, int, list[str]]] = []  # from, up to, packed rows, new lines
    for p in some:
        lead = _lead(p.key)
        if lead not in rows and p.key not in rows:
            left.append(f"{p.op} {p.key}: the table has no row {lead} for other packed rows")
            continue
        today = [rows[key if key in rows else lead].tile for key in p.buckets]
        if any(now not in (then, p.tile) for now, then in zip(today, p.presents, strict=True)):
            left.append(f"{p.op} {p.key}: the table's tile is no longer the one that was timed")
            continue
        end = max(row.end for key, row in rows.items() if _lead(key) == lead)
        old = rows.get(p.key, _Row(p.tile, end, end))
        edits.append((old.first, old.end, p.key[-1], _lines_of(p)))
        gone = [rows[key] for key in p.buckets if key in rows and key != p.key]
        edits += [(row.first, row.end, 0, []) for row in gone]
    lines = source.splitlines()
    for first, end, _, new in sorted(edits, reverse=True):
        lines[first:end] = new
    return "\n".join(lines) + "\n", left
