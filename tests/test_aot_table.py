"""The guard on what kernels compile to, on invented tables: what fails, what is reported, and when
there is nothing to compare with."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import table

ROOT = Path(__file__).parents[1]
NAME = "map_kernel / attention_map bfloat16 D=128"
LOOP = {
    "instructions": 500,
    "barriers": 3,
    "loads": {"128": 4, "32": 10},
    "copies": 5,
    "matrix": {"HGMMA 64x16x16": 16},
    "n": 16,
    "local": 0,
    "in_flight": 2,
}
KERNEL = {"registers": 200, "shared": 8192, "spills": 0, "local": 0, "loop": LOOP}
PLAIN = {"registers": 50, "shared": 0, "spills": 0, "local": 0, "loop": None, "tile": ""}
OLD: table.Table = {
    "sm_80": {NAME: {**KERNEL, "tile": "BLOCK_M=32"}, "live_kernel / side": PLAIN},
    "gfx942": {NAME: {**PLAIN, "tile": "BLOCK_M=32"}},
}
VARIANTS = {"map_kernel": 3, "live_kernel": 1}


def changed(loop: dict | None = None, **numbers: int | str) -> table.Table:
    new = copy.deepcopy(OLD)
    new["sm_80"][NAME] |= numbers
    new["sm_80"][NAME]["loop"] |= loop or {}
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
        ({"local": 1}, 1, 0),
        ({"registers": 255, "shared": 4096, "spills": 8}, 2, 1),
        ({"tile": "BLOCK_M=64"}, 0, 0),
        ({"loop": {"instructions": 550}}, 0, 0),
        ({"loop": {"instructions": 551}}, 1, 0),
        ({"loop": {"instructions": 449}}, 0, 1),
        ({"loop": {"barriers": 4}}, 1, 0),
        ({"loop": {"barriers": 2}}, 0, 1),
        ({"loop": {"loads": {"64": 8, "32": 10}}}, 1, 0),  # the widest
        ({"loop": {"loads": {"128": 4, "16": 20}}}, 1, 0),  # the narrowest
        ({"loop": {"loads": {"128": 9}}}, 0, 1),
        ({"loop": {"in_flight": 1}}, 1, 0),
        ({"loop": {"in_flight": None, "copies": 0}}, 1, 0),
        ({"loop": {"in_flight": 4}}, 0, 1),
        ({"loop": {"n": 8}}, 1, 0),
        ({"loop": {"n": None, "matrix": {}}}, 1, 0),
        ({"loop": {"n": 64}}, 0, 1),
        ({"loop": {"local": 1}}, 1, 0),
    ],
)
def test_what_is_worse_and_what_is_better(numbers: dict, worse: int, better: int, capsys) -> None:
    found = table.changes(changed(**numbers), OLD)
    assert [len(x) for x in found] == [worse, better]
    committed = {"3.7.1": {"kernels": OLD, "variants": VARIANTS}}
    assert table.check(committed, "3.7.1", changed(**numbers), VARIANTS) == worse
    printed = capsys.readouterr().out
    assert all(sentence in printed for part in found for sentence in part)
    assert (table.RENEW in printed) == bool(worse or better)


def test_no_copy_at_all_is_less_than_none_in_flight() -> None:
    none_in_flight = changed({"in_flight": 0})
    no_copy = changed({"in_flight": None})
    worse, better = table.changes(no_copy, none_in_flight)
    assert worse == [f"sm_80 {NAME}: groups of copies in flight 0 -> -1"]
    assert not better


def test_a_loop_that_came_or_went_is_told() -> None:
    unrolled = copy.deepcopy(OLD)
    unrolled["sm_80"][NAME]["loop"] = None
    assert table.changes(unrolled, OLD) == ([f"sm_80 {NAME}: has no loop any more"], [])
    assert table.changes(OLD, unrolled) == ([f"sm_80 {NAME}: has a loop now"], [])


def test_the_sentence_names_target_kernel_numbers_and_tiles() -> None:
    worse, _ = table.changes(changed(registers=255, tile="BLOCK_M=64"), OLD)
    assert worse == [f"sm_80 {NAME}: registers 200 -> 255 (tile BLOCK_M=32 -> BLOCK_M=64)"]


def test_any_shared_memory_is_more_than_none() -> None:
    new = copy.deepcopy(OLD)
    new["sm_80"]["live_kernel / side"]["shared"] = 16
    assert table.changes(new, OLD) == (["sm_80 live_kernel / side: shared 0 -> 16"], [])


def test_kernels_that_came_or_went_are_worse() -> None:
    new = copy.deepcopy(OLD)
    new["sm_80"]["new / call"] = new["sm_80"].pop(NAME)
    worse, better = table.changes(new, OLD)
    assert worse == [f"sm_80 {NAME} is gone", "sm_80 new / call is not in the file"]
    assert not better


def test_a_target_that_is_not_in_the_file_is_worse_and_one_left_out_is_not() -> None:
    assert table.changes({"gfx942": OLD["gfx942"]}, OLD) == ([], [])
    worse, _ = table.changes({"sm_90": OLD["gfx942"]}, OLD)
    assert worse == [f"sm_90 {NAME} is not in the file"]


def test_more_variants_are_worse_and_fewer_are_told(capsys) -> None:
    committed = {"3.7.1": {"kernels": OLD, "variants": VARIANTS}}
    more = {"map_kernel": 4, "live_kernel": 1}
    assert table.check(committed, "3.7.1", OLD, more) == 1
    assert "WORSE: variants of map_kernel: 3 -> 4" in capsys.readouterr().out
    assert table.check(committed, "3.7.1", OLD, {**VARIANTS, "new": 1}) == 1
    capsys.readouterr()
    assert table.check(committed, "3.7.1", OLD, {"map_kernel": 2}) == 0
    printed = capsys.readouterr().out
    assert "better: variants of map_kernel: 3 -> 2" in printed
    assert "better: variants of live_kernel: 1 -> 0" in printed


def test_a_triton_without_an_entry_fails(capsys) -> None:
    committed = {"3.7.1": {"kernels": OLD, "variants": VARIANTS}}
    assert table.check(committed, "3.8.0", OLD, VARIANTS) == 1
    said = "nothing to compare with: there is no entry for triton 3.8.0 (of 3.7.1)\n"
    assert capsys.readouterr().out == said


def test_each_version_has_its_own_entry(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    table.write(path, "3.7.1", OLD, VARIANTS)
    table.write(path, "3.6.0", changed(registers=1), {"map_kernel": 9})
    assert table.read(path) == {
        "3.6.0": {"kernels": changed(registers=1), "variants": {"map_kernel": 9}},
        "3.7.1": {"kernels": OLD, "variants": VARIANTS},
    }
    before = path.read_text(encoding="utf-8")
    table.write(path, "3.6.0", OLD, VARIANTS)
    after = path.read_text(encoding="utf-8")
    assert before.split('"3.7.1"')[1] == after.split('"3.7.1"')[1]
    lines = after.splitlines()
    assert sum('"registers"' in line for line in lines) == 6  # a line for each kernel


@pytest.mark.parametrize("text", ["", "[]", '{"triton": "3.7.1"}', '{"3.7.1": {"kernels": {}}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected what `write` wrote"):
        table.read(path)


def test_kernels_of_one_name_are_numbered() -> None:
    kernels: table.Table = {}
    for tile in ("a", "b", "c"):
        table.add(kernels, "sm_80", "live / call", {**PLAIN, "tile": tile})
    table.add(kernels, "sm_80", "live / call D=64", {**PLAIN, "tile": "d"})
    assert {name: x["tile"] for name, x in kernels["sm_80"].items()} == {
        "live / call": "a",
        "live / call #2": "b",
        "live / call #3": "c",
        "live / call D=64": "d",
    }


def test_the_committed_file_has_both_tritons_every_target_and_no_spill() -> None:
    versions = table.read(ROOT / "benchmarks" / "kernels.json")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    oldest = (
        (ROOT / "Makefile").read_text(encoding="utf-8").split("OLDEST_TRITON := ")[1].split()[0]
    )
    pinned = next(x.removeprefix("triton==") for x in constraints if x.startswith("triton=="))
    assert list(versions) == [oldest, pinned]
    for version in versions.values():
        kernels = version["kernels"]
        assert list(kernels) == ["sm_80", "sm_90", "sm_100", "gfx942"]
        for alike in (("sm_80", "gfx942"), ("sm_90", "sm_100")):  # by the tables they use
            assert len({tuple(kernels[target]) for target in alike}) == 1, "the same calls"
        entries = [x for target in kernels.values() for x in target.values()]
        assert not any(x["spills"] or x["local"] for x in entries)
        assert sum(version["variants"].values()) > 0


def test_a_part_of_the_kernels_is_not_compared() -> None:
    pytest.importorskip("triton", reason="benchmarks.aot compiles with triton")
    command = [sys.executable, "-m", "benchmarks.aot", "--only", "map", "--check", "x.json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "expected no --only" in result.stderr
