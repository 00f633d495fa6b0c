"""The guard on what kernels compile to, on made-up tables: what fails, what is told, what is not
compared."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernels

ROOT = Path(__file__).parents[1]
NAME = "map_kernel / attention_map bfloat16 D=128"
OLD = {
    "sm_80": {
        NAME: {"registers": 200, "shared": 8192, "spills": 0, "tile": "BLOCK_M=32"},
        "live_kernel / side": {"registers": 50, "shared": 0, "spills": 0, "tile": ""},
    },
    "gfx942": {NAME: {"registers": 100, "shared": 4096, "spills": 0, "tile": "BLOCK_M=32"}},
}


def changed(**numbers: int | str) -> kernels.Table:
    new = copy.deepcopy(OLD)
    new["sm_80"][NAME] |= numbers
    return new


@pytest.mark.parametrize(
    ("numbers", "worse", "better"),
    [
        ({}, 0, 0),
        ({"registers": 220}, 0, 0),  # 10 % and no more
        ({"registers": 221}, 1, 0),
        ({"registers": 179}, 0, 1),
        ({"registers": 180}, 0, 0),
        ({"shared": 9012}, 1, 0),
        ({"spills": 4}, 1, 0),
        ({"registers": 255, "shared": 4096, "spills": 8}, 2, 1),
        ({"tile": "BLOCK_M=64"}, 0, 0),
    ],
)
def test_growth_and_spills_are_worse(numbers: dict, worse: int, better: int, capsys) -> None:
    found = kernels.changes(changed(**numbers), OLD)
    assert [len(x) for x in found] == [worse, better]
    assert kernels.check(("3.7.1", OLD), "3.7.1", changed(**numbers)) == worse
    printed = capsys.readouterr().out
    assert all(sentence in printed for part in found for sentence in part)
    assert (kernels.RENEW in printed) == bool(worse or better)


def test_the_sentence_names_target_kernel_numbers_and_tiles() -> None:
    worse, _ = kernels.changes(changed(registers=255, tile="BLOCK_M=64"), OLD)
    assert worse == [f"sm_80 {NAME}: registers 200 -> 255 (tile BLOCK_M=32 -> BLOCK_M=64)"]


def test_any_shared_memory_is_more_than_none() -> None:
    new = copy.deepcopy(OLD)
    new["sm_80"]["live_kernel / side"]["shared"] = 16
    assert kernels.changes(new, OLD) == (["sm_80 live_kernel / side: shared 0 -> 16"], [])


def test_kernels_that_came_or_went_are_worse() -> None:
    new = copy.deepcopy(OLD)
    new["sm_80"]["new / call"] = new["sm_80"].pop(NAME)
    worse, better = kernels.changes(new, OLD)
    assert worse == [f"sm_80 {NAME} is gone", "sm_80 new / call is not in the file"]
    assert not better


def test_a_target_that_is_not_in_the_file_is_worse_and_one_left_out_is_not() -> None:
    assert kernels.changes({"gfx942": OLD["gfx942"]}, OLD) == ([], [])
    worse, _ = kernels.changes({"sm_90": OLD["gfx942"]}, OLD)
    assert worse == [f"sm_90 {NAME} is not in the file"]


def test_another_triton_is_not_compared(capsys) -> None:
    assert kernels.check(("3.7.1", OLD), "3.8.0", changed(spills=64)) == 0
    said = "not compared: the committed numbers are of triton 3.7.1 and this is 3.8.0\n"
    assert capsys.readouterr().out == said


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    kernels.write(path, "3.7.1", OLD)
    assert kernels.read(path) == ("3.7.1", OLD)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"registers"' in line for line in lines) == 3  # a line for each kernel


@pytest.mark.parametrize("text", ["", "[]", '{"triton": "3.7.1"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected what `write` wrote"):
        kernels.read(path)


def test_kernels_of_one_name_are_numbered() -> None:
    table: kernels.Table = {}
    counts = {"registers": 1, "shared": 0, "spills": 0}
    for tile in ("a", "b", "c"):
        kernels.add(table, "sm_80", "live / call", tile, counts)
    kernels.add(table, "sm_80", "live / call D=64", "d", counts)
    assert {name: x["tile"] for name, x in table["sm_80"].items()} == {
        "live / call": "a",
        "live / call #2": "b",
        "live / call #3": "c",
        "live / call D=64": "d",
    }


def test_the_committed_file_has_every_target_the_pinned_triton_and_no_spill() -> None:
    version, table = kernels.read(ROOT / "benchmarks" / "kernels.json")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"triton=={version}" in constraints
    assert list(table) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    assert len({tuple(entries) for entries in table.values()}) == 1  # the same calls on each
    assert not any(x["spills"] for entries in table.values() for x in entries.values())


def test_a_part_of_the_kernels_is_not_compared() -> None:
    pytest.importorskip("triton", reason="benchmarks.aot compiles with triton")
    command = [sys.executable, "-m", "benchmarks.aot", "--only", "map", "--check", "x.json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "expected no --only" in result.stderr
