"""The sweep's proposals put into copies of the real tile tables, with invented times."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.gpu import results
from benchmarks.gpu.reporting import tile_tables
from tests.gpu_record import Record, begun, best

NONE = None  # for registers or packed rows
SIDE, MAP = "side_attention", "attention_map"
SOURCES = {op: path.read_text(encoding="utf-8") for op, path in tile_tables.FILES.items()}


class Tile(NamedTuple):
    """As in groundkern.tiles, which needs Triton."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2
    registers: int | None = None


def _dict(source: str) -> dict[tuple, tuple]:
    """TILES as Python evaluates it."""
    (node,) = (x for x in ast.parse(source).body if ast.unparse(x).startswith("TILES = "))
    names: dict = {"Tile": Tile}
    exec(ast.unparse(node), names)
    return names["TILES"]


TABLES = {op: _dict(source) for op, source in SOURCES.items()}


@pytest.fixture
def sources(tmp_path, monkeypatch) -> dict[str, Path]:
    """Copies in place of the kernels' sources."""
    paths = {op: tmp_path / f"{op}.py" for op in SOURCES}
    for op, path in paths.items():
        path.write_text(SOURCES[op], encoding="utf-8")
    monkeypatch.setattr(tile_tables, "FILES", paths)
    return paths


def _put(record: Record, path: Path, *others: str) -> int:
    return results.main([str(record.write(path)), *others, "--tiles"])


def _side(record: Record, packed: int | None, tile: list, us: float, was: float = 15.0) -> Record:
    present = list(TABLES[SIDE]["dq", False, 128])
    return best(record, SIDE, ["dq", False, 128, packed], tile, us, present, was)


def _changes(before: str, after: str) -> tuple[set[str], set[str]]:
    """(lines removed, lines added)."""
    old, new = before.splitlines(), after.splitlines()
    return set(old) - set(new), set(new) - set(old)


def _formatted(path: Path) -> bool:
    """Whether ruff would leave it unchanged and finds no line too long."""
    config = str(Path(results.__file__).parents[2] / "pyproject.toml")
    ruff = [sys.executable, "-m", "ruff"]
    commands = (["format", "--check"], ["check"])
    done = [subprocess.run([*ruff, *c, "--config", config, str(path)]) for c in commands]
    return all(x.returncode == 0 for x in done)


def test_the_tables_are_read_as_python_reads_them() -> None:
    for op, source in SOURCES.items():
        assert {key: r.tile for key, r in tile_tables.table(source).items()} == TABLES[op]
        assert tile_tables.rewritten(source, []) == (source, [])


def test_a_row_for_each_bucket(sources, tmp_path, capsys) -> None:
    """The smallest first, behind the row for all packed rows, which is replaced if it was measured
    itself; no other row changes."""
    pytest.importorskip("ruff")
    record = begun()
    for packed, tile, us in (
        (512, [128, 64, 8, 4, 255], 123.44),
        (16, [16, 64, 4, 3, NONE], 10.04),
        (64, [64, 64, 4, 2, NONE], 12.0),
        (NONE, [128, 32, 8, 2, 255], 200.0),
    ):
        _side(record, packed, tile, us, us + 3)
    assert _put(record, tmp_path / "r.jsonl") == 0
    after = sources[SIDE].read_text(encoding="utf-8")
    gone, come = _changes(SOURCES[SIDE], after)
    row = f'    ("dq", False, 128): {tile_tables.written(TABLES[SIDE]["dq", False, 128])},'
    assert gone == {row}
    origin = "# H200, 2026-11-28:"
    block = (
        f'    ("dq", False, 128): Tile(128, 32, 8, 2, 255),  {origin} 200.0 us, 203.0 us before',
        f'    ("dq", False, 128, 16): Tile(16, 64, 4, 3),  {origin} 10.0 us, 13.0 us before',
        f'    ("dq", False, 128, 64): Tile(64, 64, 4),  {origin} 12.0 us, 15.0 us before',
        f"    {origin} 123.4 us, 126.4 us before",
        '    ("dq", False, 128, 512): Tile(128, 64, 8, 4, 255),',
    )
    assert come == set(block)
    assert "\n".join(block) in after
    expected = dict(TABLES[SIDE])
    expected[("dq", False, 128)] = Tile(128, 32, 8, 2, 255)
    expected[("dq", False, 128, 16)] = Tile(16, 64, 4, 3)
    expected[("dq", False, 128, 64)] = Tile(64, 64, 4)
    expected[("dq", False, 128, 512)] = Tile(128, 64, 8, 4, 255)
    assert _dict(after) == expected
    assert _formatted(sources[SIDE])
    assert sources[MAP].read_text(encoding="utf-8") == SOURCES[MAP]
    out = capsys.readouterr().out
    assert f"+{block[1]}" in out and f"-{row}" in out
    assert _put(record, tmp_path / "r.jsonl") == 0
    assert sources[SIDE].read_text(encoding="utf-8") == after, "a second time changes nothing"


def test_buckets_that_agree_are_one_row(sources, tmp_path) -> None:
    """Rows that an earlier sweep wrote for them are removed."""
    earlier = _side(begun(), 16, [16, 64, 8, 3, NONE], 11.0)
    _side(earlier, 64, [64, 64, 8, 4, 255], 1111.0, 1500.0)  # with its comment above it
    assert _put(earlier, tmp_path / "1.jsonl") == 0
    text = sources[SIDE].read_text(encoding="utf-8")
    assert len(_dict(text)) == len(TABLES[SIDE]) + 2
    assert "\n    # H200, 2026-11-28: 1111.0 us" in text
    record = begun(date="2026-11-29T09:00:00+00:00")
    tile, key = [32, 64, 4, 4, NONE], ["dq", False, 128]
    best(record, SIDE, [*key, 16], tile, 9.0, [16, 64, 8, 3, NONE], 11.0)
    best(record, SIDE, [*key, 64], tile, 10.0, [64, 64, 8, 4, 255], 12.0)
    best(record, SIDE, [*key, NONE], tile, 90.5, list(TABLES[SIDE][tuple(key)]), 95.0)
    assert _put(record, tmp_path / "2.jsonl") == 0
    after = sources[SIDE].read_text(encoding="utf-8")
    assert _changes(SOURCES[SIDE], after)[1] == {
        "    # H200, 2026-11-29: 9.0 to 90.5 us, 11.0 to 95.0 us before",
        '    ("dq", False, 128): Tile(32, 64, 4, 4),',
    }
    assert _dict(after) == TABLES[SIDE] | {("dq", False, 128): Tile(32, 64, 4, 4)}


def test_a_kernel_that_serves_only_so_many_lanes_gets_no_row_for_all(sources, tmp_path) -> None:
    """Its buckets keep their rows, even if they agree."""
    record, tile = begun(), [64, 32, 8, 2, NONE]
    for lanes, us in ((16, 8.0), (64, 9.0)):
        key = ["backward", False, 128, lanes]
        best(record, SIDE, key, tile, us, list(TABLES[SIDE][tuple(key)]), us + 1)
    assert _put(record, tmp_path / "r.jsonl") == 0
    changed = {("backward", False, 128, lanes): Tile(64, 32, 8) for lanes in (16, 64)}
    assert _dict(sources[SIDE].read_text(encoding="utf-8")) == TABLES[SIDE] | changed


def test_one_bucket_alone_does_not_speak_for_the_others(sources, tmp_path) -> None:
    assert _put(_side(begun(), 16, [16, 64, 4, 3, NONE], 9.0), tmp_path / "r.jsonl") == 0
    added = {("dq", False, 128, 16): Tile(16, 64, 4, 3)}
    assert _dict(sources[SIDE].read_text(encoding="utf-8")) == TABLES[SIDE] | added


def test_a_tile_that_stays_says_since_when(sources, tmp_path) -> None:
    """In a table without kernels."""
    record, present = begun(device="NVIDIA H100 80GB HBM3"), list(TABLES[MAP][False, 128])
    for packed, us in ((64, 8.0), (512, 20.0)):
        best(record, MAP, [NONE, False, 128, packed], present, us, present, us)
    assert _put(record, tmp_path / "r.jsonl") == 0
    after = sources[MAP].read_text(encoding="utf-8")
    row = f"    (False, 128): {tile_tables.written(present)},"
    reason = "  # H100, 2026-11-28: unchanged at 8.0 to 20.0 us"
    assert _changes(SOURCES[MAP], after) == ({row}, {row + reason})
    assert _dict(after) == TABLES[MAP]


def test_what_was_not_timed_against_the_table_is_left_alone(sources, tmp_path, capsys) -> None:
    record = best(begun(), SIDE, ["dq", False, 128, 16], [16, 64, 4, 3, NONE], 9.0,
                  [16, 32, 16, 2, NONE], 12.0)  # fmt: skip
    best(record, SIDE, ["dq", False, 96, 16], [16, 64, 4, 3, NONE], 9.0, [16, 64, 4, 3, NONE], 9.0)
    assert _put(record, tmp_path / "r.jsonl") == 0
    assert sources[SIDE].read_text(encoding="utf-8") == SOURCES[SIDE]
    out = capsys.readouterr().out
    assert "left alone: side_attention ('dq', False, 128, 16): the table's tile is no longer" in out
    assert "the table has no row ('dq', False, 96) for other packed rows" in out


@pytest.mark.parametrize(
    ("tile", "why"),
    [
        ([16, 48, 4, 2, NONE], "powers of two"),
        ([24, 32, 4, 2, NONE], "powers of two"),
        ([16, 32, 6, 2, NONE], "powers of two"),
        ([16, 16, 4, 2, NONE], "a multiple of 32 keys"),
        ([8, 32, 4, 2, NONE], "16 rows or more"),
        ([16, 32, 4, 2, 300], "no thread has 300 registers"),
        ([16, 32, 4], "expected block_m, block_n"),
        ([16, 32.0, 4, 2, NONE], "expected block_m, block_n"),
        (["16", 32, 4, 2, NONE], "expected block_m, block_n"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(sources, tmp_path, capsys, tile, why) -> None:
    """And so is everything else in its record."""
    record = _side(_side(begun(), 64, [64, 64, 4, 2, NONE], 12.0), 16, tile, 10.0)
    assert _put(record, tmp_path / "r.jsonl") == 1
    assert why in capsys.readouterr().err
    assert sources[SIDE].read_text(encoding="utf-8") == SOURCES[SIDE]


def _timeless() -> Record:
    return _side(begun(), 16, [16, 64, 4, 3, NONE], "nan")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _side(begun(rehearsed=True), 16, [16, 64, 4, 3, NONE], 9.0), "rehearsed"),
        (lambda: _side(begun(commit="unknown"), 16, [16, 64, 4, 3, NONE], 9.0), "checked out"),
        (lambda: _side(begun(device="stand-in"), 16, [16, 64, 4, 3, NONE], 9.0), "not a GPU"),
        (_timeless, "without a time"),
        (begun, "no sweep of tiles"),
    ],
)
def test_tiles_of_no_measurement_are_refused(sources, tmp_path, capsys, make, why) -> None:
    assert _put(make(), tmp_path / "r.jsonl") == 1
    assert why in capsys.readouterr().err
    assert sources[SIDE].read_text(encoding="utf-8") == SOURCES[SIDE]


def test_tiles_of_two_devices_are_refused(sources, tmp_path, capsys) -> None:
    other = _side(begun(device="NVIDIA H100 PCIe"), 16, [16, 64, 4, 3, NONE], 9.0)
    path = str(other.write(tmp_path / "2.jsonl"))
    assert _put(_side(begun(), 16, [16, 64, 4, 3, NONE], 9.0), tmp_path / "1.jsonl", path) == 1
    assert "two devices or commits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_cards(device: str, card: str) -> None:
    assert tile_tables.card(device) == card
