"""What is made of the lines that `make gpu` records, with invented numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.gpu import results
from benchmarks.gpu.reporting import goals, sessions, tables
from benchmarks.gpu.reporting.failures import failures
from benchmarks.timing.results import left_out, read, write
from tests import gpu_record
from tests.gpu_record import COMMIT, EAGER, GRAPH, LOSS, SIDE, SIDE_LONG, begun, first, row, second


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder in place of benchmarks/results, with the real one's table of files."""
    folder = tmp_path / "results"
    folder.mkdir()
    text = (tables.RESULTS / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", folder)
    return folder


def _printed(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, output without the frames of tables, errors)."""
    status = results.main([str(x) for x in arguments])
    out, error = capsys.readouterr()
    lines = (" ".join(x.replace("│", " ").split()) for x in out.splitlines())
    return status, "\n".join(lines), error


def _line(out: str, *parts: str) -> str:
    """The first line that contains all parts."""
    return next(x for x in out.splitlines() if all(w in x for w in parts))


def test_the_report_says_what_failed_before_what_was_measured(tmp_path, capsys) -> None:
    status, out, _ = _printed(capsys, first().write(tmp_path / "results.jsonl"))
    assert status == 0
    assert out.startswith(f"NVIDIA H200, commit {COMMIT}\nresults.jsonl: call first, 2026-11-28")
    expected = (
        "smoke: 1 of 2 right; tests: 1 passed, 1 failed, 1 skipped",
        "- smoke: bad one: dq off by nan, allowed 0.01",
        "- smoke: first case and 1 more: CompilationError: no int.to",
        f"- {SIDE_LONG}, groundkern triton: failed: CUDA error",
        "- tests/t.py::b[y]: E AssertionError: 1 != 2",
        "- step smoke: failed",
        "- step tests: timed out",
        "- step tests_large: left out",
        "Ceilings: bandwidth 4 TB/s, bfloat16 800 TFLOP/s",
        "Kernels by device time",
        "Tiles",
    )
    places = [out.index(x) for x in expected]
    assert places == sorted(places)


def test_the_report_has_a_line_for_each_case(tmp_path, capsys) -> None:
    _, out, _ = _printed(capsys, first().write(tmp_path / "r.jsonl"))
    shown = "qwen/S32768xN8 full 0.312 0.55 80 1.3 55 % of bandwidth met"
    assert _line(out, "qwen/S32768xN8 ") == shown
    assert _line(out, "qwen/S32768xN256").endswith("39 1.3 40 % of matmul rate not met")
    # Each product of the loss, and their sum.
    assert _line(out, "qwen/trained/N512xV151936") == (
        "qwen/trained/N512xV151936 full 1.3 19.2 1.04 0.4 + 0.41 + 0.42 = 1.23 GEMMs + 5 % met"
    )
    assert _line(out, "dkv_kernel") == (
        f"{SIDE} full 75 % dkv_kernel 150 in 2, 25 % forward_kernel 50 200"
    )
    assert _line(out, "->", "('dq', False, 128, 16)") == (
        "side_attention ('dq', False, 128, 16) Tile(64, 32, 4) -> Tile(16, 64, 4, 3) "
        "12.5 10.0 20.0 2 0"
    )


def test_a_broken_record_says_what_is_left_of_it(tmp_path, capsys) -> None:
    record = begun().add("replay", "begin", limit=9.0).add("replay", "start", case="a")
    record.add("replay", "done", case="a", seconds=1).add("replay", "start", case="b")
    record.add("replay", "row", case="a", row={"op": "side_attention"}).add("smoke", "smoke")
    gpu_record.measured(record, SIDE, [row(SIDE, GRAPH, "nan"), row(SIDE, EAGER, "inf")])
    path = record.write(tmp_path / "cut.jsonl", end='{"t": 9.0, "step": "replay", "ev')
    status, out, _ = _printed(capsys, path)
    assert status == 0
    assert _line(out, "not JSON", "cut.jsonl")
    assert _line(out, "a row line at", "lacks fields") and _line(out, "a smoke line at")
    assert "- step replay began and has no end: the record stops there" in out
    assert "- replay: b: began and did not end" in out
    assert _line(out, "qwen/S32768xN8", "timed timed"), "no number is shown for nan"


def test_nothing_on_record(tmp_path, capsys) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    status, out, _ = _printed(capsys, path)
    assert (status, out) == (1, "empty.jsonl holds no line of a run")
    with pytest.raises(SystemExit):
        results.main([str(tmp_path / "absent.jsonl")])


def test_many_failures_are_counted(tmp_path) -> None:
    record = begun()
    for i in range(40):
        record.add("smoke", "error", case=f"{i}", kind="ValueError", message=f"{i}", traceback="")
    (session,), _ = sessions.read([record.write(tmp_path / "r.jsonl")])
    found = failures(session.last)
    assert len(found) == 13
    assert found[-1] == "and 28 more of this sort"


def test_a_lost_process_is_told_by_its_message(tmp_path) -> None:
    record = begun().add("replay", "error", case="x", kind="crashed", message="SIGSEGV",
                         traceback="see log.txt")  # fmt: skip
    (session,), _ = sessions.read([record.write(tmp_path / "r.jsonl")])
    assert failures(session.last) == ["replay: x: crashed: SIGSEGV ... see log.txt"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_calls_at_one_commit_are_one(tmp_path, capsys, order) -> None:
    """In whichever order they are named, the later call's rows count."""
    paths = first().write(tmp_path / "1.jsonl"), second().write(tmp_path / "2.jsonl")
    files = [paths[i] for i in order]
    (session,), wrong = sessions.read(files)
    assert not wrong
    assert [call.name for call in session.calls] == ["first", "second"]
    found = {(r["problem"], r["contestant"]): r for r in session.rows()}
    assert len(found) == len(session.rows()) == 12
    assert (found[SIDE, GRAPH]["p50_ms"], found[SIDE, GRAPH]["date"][11:13]) == (0.29, "12")
    assert (found[LOSS, GRAPH]["p50_ms"], found[LOSS, GRAPH]["date"][11:13]) == (1.3, "10")
    _, out, _ = _printed(capsys, *files)
    assert out.count(f"NVIDIA H200, commit {COMMIT}") == 1
    assert "0.8 SDPA 55 % of bandwidth met" in _line(out, "qwen/S32768xN8", "full 0.29")


@pytest.mark.parametrize("changed", [{"commit": "ba9876543210"}, {"device": "NVIDIA H100 PCIe"}])
def test_two_commits_or_devices_stay_apart(tmp_path, capsys, changed) -> None:
    files = first().write(tmp_path / "1.jsonl"), second(**changed).write(tmp_path / "2.jsonl")
    some, _ = sessions.read(list(files))
    assert [len(s.calls) for s in some] == [1, 1]
    _, out, _ = _printed(capsys, *files)
    for session in some:
        assert _line(out, f"{session.last.card}, commit {session.last.commit}")


def test_two_calls_in_one_file(tmp_path) -> None:
    path = first().write(tmp_path / "r.jsonl")
    other = second(commit="ba9876543210").write(tmp_path / "2.jsonl")
    path.write_text(path.read_text() + other.read_text())
    some, _ = sessions.read([path])
    assert [s.last.commit for s in some] == [COMMIT, "ba9876543210"]


@pytest.mark.parametrize("x", [None, "nan", "inf", float("nan"), float("inf"), True])
def test_what_is_no_number(x) -> None:
    """Also a bare NaN, which Python's JSON reads."""
    assert sessions.number(x) is None


def test_goals() -> None:
    assert goals.goal_of(row(LOSS, GRAPH, 1.0, mode="forward")) is None
    assert goals.goal_of(row(SIDE, GRAPH, 1.0, bandwidth=None)) is None
    bytes_ = {"bandwidth": 4e12, "matmul_rate": 8e14, "floor_bytes": 2e8, "floor_flops": 1e9}
    products = {**bytes_, "floor_flops": 1e12}
    for mode, limits in (("forward", (70, 55)), ("full", (55, 40))):
        for work, limit in zip((bytes_, products), limits, strict=True):
            for percent in (limit, limit - 0.1):
                side = row(SIDE, GRAPH, 1.0, mode=mode, **work) | {"percent_of_floor": percent}
                assert goals.goal_of(side).met(side) is (percent == limit)
    sizes = {"rows": 4096, "vocabulary": 128256}
    many = row(LOSS, GRAPH, 1.0, to_gemms_p50=1.1, **sizes)
    assert goals.goal_of(many) == goals.GOALS["chunks"]
    assert goals.goal_of(many).met(many) is True
    few = many | {"rows": 512}
    assert goals.goal_of(few).met(few) is False
    assert goals.goal_of(few).met(few | {"to_gemms_p50": "nan"}) is None


def test_results_are_dated_and_say_where_they_come_from(folder, tmp_path, capsys) -> None:
    """They pass what tests/test_benchmarks.py asks of every committed file, and no row failed."""
    files = first().write(tmp_path / "1.jsonl"), second().write(tmp_path / "2.jsonl")
    status, out, error = _printed(capsys, *files, "--write")
    assert (status, error) == (0, "")
    assert "1 rows that failed, disagree or have no number were left out" in out
    stem = "2026-11-28-h200"
    parts = ("kernels.csv", "smoke.csv", "tiles.csv")
    names = {"README.md", f"{stem}.csv", *(f"{stem}-{x}" for x in parts)}
    assert {p.name for p in folder.iterdir()} == names
    path = folder / f"{stem}.csv"
    rows = read(path)
    assert {r["status"].split(":")[0] for r in rows} == {"timed", "refused"}
    assert {r["commit"] for r in rows} == {COMMIT}
    assert all(r["date"] and r["torch"] and r["threads"] and r["processor"] for r in rows)
    names = left_out(path)
    assert "first, step tests_large: left out" in names
    assert any("CUDA error" in x for x in names)
    text = (folder / "README.md").read_text()
    assert f"| `{stem}` | NVIDIA H200: 3 problems, calls first and second; beside it" in text
    _printed(capsys, *files, "--write")
    assert (folder / "README.md").read_text() == text, "the same line once"
    chosen = [x for x in read(folder / f"{stem}-tiles.csv") if x["chosen"]]
    assert [(x["kernel"], x["block_n"], x["us"]) for x in chosen] == [("dq", 64, 10.0)]


def test_only_what_ran_is_written(folder, tmp_path, capsys) -> None:
    """Another commit of the same day gets a name of its own."""
    record = gpu_record.measured(begun(), SIDE, [row(SIDE, GRAPH, 1.0), row(SIDE, EAGER, "nan")])
    path = record.write(tmp_path / "r.jsonl")
    assert _printed(capsys, path, "--write")[0] == 0
    assert {p.suffix for p in folder.iterdir()} == {".md", ".csv"}
    assert len(read(folder / "2026-11-28-h200.csv")) == 1
    other = second(commit="ba9876543210").write(tmp_path / "2.jsonl")
    assert _printed(capsys, other, "--write")[0] == 0
    assert (folder / "2026-11-28-h200-ba98765.csv").exists()
    assert read(folder / "2026-11-28-h200.csv")[0]["commit"] == COMMIT


def _without(record: gpu_record.Record, event: str) -> gpu_record.Record:
    record.lines = [x for x in record.lines if x["event"] != event]
    return record


def _elsewhere() -> gpu_record.Record:
    return gpu_record.measured(begun(), SIDE, [row(SIDE, GRAPH, 1.0) | {"device": "NVIDIA L4"}])


REFUSED = {
    "rehearsed": (lambda: second(rehearsed=True), "rehearsed on a stand-in"),
    "no word on it": (lambda: second(rehearsed=None), "rehearsed on a stand-in"),
    "no run line": (lambda: _without(second(), "run"), "nobody knows whether"),
    "no device line": (lambda: _without(second(), "device"), "no device line"),
    "dirty": (lambda: second(commit=f"{COMMIT}-dirty"), "not one that can be checked out"),
    "unknown": (lambda: second(commit="unknown"), "commit 'unknown' is not one"),
    "stand-in": (lambda: second(device="stand-in"), "the device is stand-in, not a GPU"),
    "CPU": (lambda: second(device="cpu"), "the device is cpu, not a GPU"),
    "unstamped": (lambda: second(processor=""), "lacks processor"),
    "elsewhere": (_elsewhere, "holds lines of 'NVIDIA L4' beside 'NVIDIA H200'"),
    "two devices": (
        lambda: second().add("ceilings", "device", device="NVIDIA L4"),
        "holds lines of 'NVIDIA L4'",
    ),
    "no time": (begun, "no row with a time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_but_a_measurement_becomes_a_result(folder, tmp_path, capsys, case) -> None:
    """Nor does a good record that is named in the same command."""
    make, why = REFUSED[case]
    paths = [make().write(tmp_path / "bad.jsonl")]
    if case != "no time":
        paths.append(first().write(tmp_path / "good.jsonl"))
    status, _, error = _printed(capsys, *paths, "--write")
    assert status == 1
    assert error.startswith("refused: ") and why in error
    assert [p.name for p in folder.iterdir()] == ["README.md"]


def test_the_commit_of_a_machine_without_git_is_the_runs(folder, tmp_path, capsys) -> None:
    record = second()
    next(x for x in record.lines if x["event"] == "device")["commit"] = "unknown"
    assert _printed(capsys, record.write(tmp_path / "r.jsonl"), "--write")[0] == 0
    assert read(folder / "2026-11-28-h200.csv")[0]["commit"] == COMMIT


def test_the_readme_shows_the_newest_results_of_a_gpu(folder, tmp_path, capsys) -> None:
    files = first().write(tmp_path / "1.jsonl"), second().write(tmp_path / "2.jsonl")
    assert readme.latest_gpu(folder) is None
    assert readme.gpu(None) == readme.NO_GPU
    _printed(capsys, *files, "--write")
    path = readme.latest_gpu(folder)
    assert path == folder / "2026-11-28-h200.csv"
    block = readme.gpu(path)
    assert block.splitlines()[2] == (
        "| `side_attention/S32768xN8`: some sizes | full | 0.29 | 86.2 | 1.3 | SDPA | **0.80** |"
    )
    assert block.count("\n| ") == 3, "one line a problem: what has no replay has none"
    assert f"NVIDIA H200, torch 2.11.0, triton 3.6.0, commit {COMMIT}, 2026-11-28" in block
    assert "**1 of 3 checks against fp64 failed**" in block


def test_cpu_and_gpu_results_do_not_take_each_others_place(folder, monkeypatch, tmp_path) -> None:
    """Whatever the files are called."""
    monkeypatch.setattr(readme, "RESULTS", folder)
    for name, device, contestant in (
        ("2026-01-01-cpu", "cpu", "groundkern native"),
        ("2026-01-02-cpu", "NVIDIA H200", GRAPH),
        ("2026-01-03-h100-cpu", "NVIDIA H100", GRAPH),
        ("2026-01-04-training-step", "NVIDIA H200", "groundkern, all"),
        ("2026-01-05-cpu-whole", "cpu", "groundkern native"),
    ):
        one = row(SIDE, contestant, 1.0) | {"device": device, "date": name[:10]}
        write(folder / f"{name}.csv", [one])
    assert readme.latest("cpu").stem == "2026-01-01-cpu"
    assert readme.latest_gpu(folder).stem == "2026-01-03-h100-cpu"
    with pytest.raises(ValueError):
        readme.latest("training-step")


def test_both_blocks_must_be_in_the_page(tmp_path) -> None:
    page = tmp_path / "page.md"
    text = readme.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("<!-- gpu:begin -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="gpu:begin"):
        readme.rewritten(page, readme.latest())


def test_contestants_are_those_that_the_steps_write() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.steps import timing

    assert (timing.GRAPH, timing.EAGER) == (sessions.GRAPH, sessions.EAGER) == (GRAPH, EAGER)
