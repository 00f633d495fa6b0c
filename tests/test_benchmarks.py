"""The benchmarks: floors counted by hand, baselines that compute what ours compute, a loop that
interleaves and drops nobody, and files that say where numbers come from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import __main__ as program
from benchmarks import problems
from benchmarks.contestants import admission, baselines, flex
from benchmarks.costs import floors
from benchmarks.figures import plots
from benchmarks.timing import memory, results, rounds, suite
from benchmarks.timing.results import Row

CPU = torch.device("cpu")
SIZES = floors.AttentionSizes(
    rows=2, heads=4, kv_heads=2, dim=8, value_dim=16, keys=10, used=5, itemsize=2, columns=3
)
QUICK = problems.problems(
    shapes=[problems.QUICK], ops=list(problems.OPS), dtypes=[torch.float32], keys=[], rows=[]
)


def test_the_floor_of_side_attention() -> None:
    forward = floors.side_attention(SIZES, "forward")
    assert forward.gemms == ((2, 4, 5, 8), (2, 4, 16, 5))
    assert forward.flops == 2 * 2 * 4 * 5 * (8 + 16)
    # q 2x4x8, used k and v 2x5x24, out 2x4x16, lse 2x4 in fp32
    assert forward.bytes == 2 * (64 + 240 + 128) + 4 * 8
    full = floors.side_attention(SIZES, "full")
    assert full.gemms[-3:] == ((2, 5, 16, 4), (2, 4, 8, 5), (2, 5, 8, 4))  # dv, dq, dk
    assert full.flops == 2 * 2 * 4 * 5 * (4 * 8 + 3 * 16)
    # q, used k and v, out, dout and lse read; dq and all of dk, dv (2x10x24) written
    assert full.bytes - forward.bytes == 2 * (64 + 240 + 2 * 128 + 64 + 480) + 4 * 8


def test_the_floor_of_maps() -> None:
    forward = floors.attention_map(SIZES, "forward")
    assert forward.flops == 2 * 2 * 4 * 5 * 8
    assert forward.bytes == 2 * (64 + 80) + 4 * 6
    full = floors.attention_map(SIZES, "full")
    assert full.flops == 4 * forward.flops
    assert full.bytes - forward.bytes == 2 * (64 + 80 + 64 + 160) + 4 * 6
    kl = floors.attention_map(SIZES, "forward", per_row=True)
    assert kl.bytes == 2 * (64 + 80) + 4 * 2 + 4 * 6
    contribution = floors.attention_map(SIZES, "forward", contribution=True)
    assert contribution.flops == forward.flops + 2 * 2 * 4 * 3 * 16
    assert contribution.bytes == forward.bytes + 2 * (128 + 96)


@pytest.mark.parametrize(
    ("mode", "trained", "gemms", "elements"),
    [
        ("forward", True, 1, 100 * 8 + 3 * 8),
        ("full", False, 2, 2 * 100 * 8 + 3 * 8 + 7 * 8),
        ("full", True, 3, 3 * 100 * 8 + 2 * 3 * 8 + 7 * 8),
    ],
)
def test_the_floor_of_linear_cross_entropy(mode, trained, gemms, elements) -> None:
    floor = floors.linear_cross_entropy(
        rows=7, counted=3, dim=8, vocabulary=100, itemsize=4, mode=mode, trained=trained
    )
    assert floor.flops == gemms * 2 * 3 * 8 * 100
    assert floor.bytes == 4 * elements


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    floor = floors.Floor(1000, ((1, 10, 10, 10),))
    assert floor.seconds(bandwidth=10.0, matmul_rate=1e6) == 100.0
    assert floor.seconds(bandwidth=1e6, matmul_rate=20.0) == 100.0


@pytest.mark.parametrize("problem", QUICK, ids=lambda p: p.name)
@pytest.mark.parametrize("mode", ["forward", "full"])
def test_baselines_compute_what_ours_compute(problem: problems.Problem, mode: str) -> None:
    found = admission.contestants(
        problem, mode, CPU, backends=["auto", "reference"], compiled=False
    )
    states = {c.name: c.status for c in found}
    assert [c.kind for c in found[:2]] == ["floor", "ours"]
    wrong = {n: s for n, s in states.items() if not s.startswith(("timed", "refused"))}
    assert not wrong
    assert sum(c.run is not None for c in found if c.kind == "baseline")


FLEX = {
    "side_attention": flex.attention_step,
    "attention_kl_visible": flex.closed_form_step,
    "attention_kl_columns": flex.closed_form_step,
}


@pytest.mark.parametrize("name", FLEX)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_what_ours_compute(name: str) -> None:
    """Uncompiled and without gradients, which is all that runs on CPU. On CUDA `contestants` checks
    every result."""
    options = {"rows": 4, "keys": 64}
    tiny = problems.TINY, torch.float32
    if name == "side_attention":
        problem = problems.side_attention(*tiny, shape="quick", visual=40, **options)
    else:
        over = name.split("_")[-1]
        problem = problems.attention_map(*tiny, shape="quick", over=over, heads="each", **options)
    call = problem.make(CPU)
    with torch.no_grad():
        got = FLEX[name](call, flex_attention)(call.inputs)
        torch.testing.assert_close(got[0], call.run()[0], rtol=1e-4, atol=1e-5)
    assert "no backward on CPU" in refusal(flex.attention, call)


def refusal(adapter, call) -> str:
    with pytest.raises(baselines.Refused) as reason:
        adapter(call)
    return str(reason.value)


def test_a_wrong_baseline_is_named_and_not_timed(monkeypatch) -> None:
    def wrong(call):
        return lambda x: (2 * baselines.sdpa(call)(x)[0],)

    def crash(call):
        raise RuntimeError("no such kernel")

    table = {"doubled": wrong, "crash": crash, "SDPA": baselines.sdpa}
    monkeypatch.setitem(baselines.BASELINES, "side_attention", table)
    rows = measured(QUICK[0])
    states = {r["contestant"]: r["status"] for r in rows}
    assert states["doubled"].startswith("disagrees: result 0")
    assert states["crash"] == "failed: RuntimeError: no such kernel"
    assert states["SDPA"] == "timed"
    assert len(results.failures(rows)) == 2
    assert all(r["p50_ms"] is None for r in rows if r["status"] != "timed")


def test_a_wrong_gradient_is_found() -> None:
    a, b = torch.ones(3), torch.ones(3)
    assert not admission.disagreement(([a], [a]), ([b], [b]), torch.float32)
    assert "gradient 0" in admission.disagreement(([a], [1.1 * a]), ([b], [b]), torch.float32)
    nan = torch.full((3,), torch.nan)
    assert "result 0" in admission.disagreement(([nan], [a]), ([b], [b]), torch.float32)


def measured(problem: problems.Problem, **options) -> list[Row]:
    defaults = {"backends": ["auto"], "compiled": False, "with_memory": False, "seconds": 0.0}
    return suite.measure(
        problem, "full", CPU, **{**defaults, "least": 3, "ceilings": {}, **options}
    )


def test_rounds_interleave() -> None:
    """Every round runs everyone once, and the order changes."""
    seen: list[str] = []
    runs = {name: lambda n=name: seen.append(n) for name in "abcd"}
    samples = rounds.interleave(runs, rounds.cpu_timer, seconds=0.0, least=8)
    orders = [tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert len(orders) == 8
    assert all(sorted(r) == list("abcd") for r in orders)
    assert len(set(orders)) > 1
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abcd", 8)


def test_an_error_in_a_round_ends_the_measurement() -> None:
    with pytest.raises(ZeroDivisionError):
        rounds.interleave({"a": lambda: None, "b": lambda: 1 / 0}, rounds.cpu_timer, seconds=0.0)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down threefold between rounds does not move them."""
    assert rounds.ratio([1.0, 3.0, 9.0], [2.0, 6.0, 18.0]) == (0.5, 0.5, 0.5)
    assert rounds.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_memory_counts_what_a_call_touches() -> None:
    """In a process of its own: one that has freed memory before may reuse the same pages."""
    program = """
import torch
from benchmarks.contestants import admission
from benchmarks.timing import memory, rounds
run = lambda: torch.ones(2**22)
run()
found = [admission.Contestant("ones", "ours", run)]
print(memory.of_contestants(found, torch.device("cpu"))["ones"])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **memory.ALLOCATOR},
        capture_output=True,
        text=True,
        check=True,
    )
    touched = torch.float32.itemsize * 2**22
    assert 0.9 * touched < int(result.stdout) < 1.5 * touched


@pytest.mark.long
def test_memory_in_a_fresh_process() -> None:
    peaks = memory.in_fresh_process(QUICK[0], "full", backends=["auto"], compiled=False)
    timed = {r["contestant"] for r in measured(QUICK[0]) if r["status"] == "timed"}
    assert set(peaks) == timed - {admission.FLOOR}


def test_the_command_line(tmp_path, capsys) -> None:
    """One op at tiny sizes: a table, a file of stamped rows, and figures."""
    files = ["--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path)]
    assert program.main(["side_attention", "--quick", *files]) == 0
    assert "groundkern" in capsys.readouterr().out
    rows = results.read(tmp_path / "r.csv")
    named = {"side_attention"}, {"float32", "bfloat16"}
    assert ({r["op"] for r in rows}, {r["dtype"] for r in rows}) == named
    for row in rows:
        assert row["commit"] and row["date"] and row["torch"] and row["threads"]
        assert (row["status"] == "timed") == (row["p50_ms"] is not None)
    assert (tmp_path / "side_attention.png").stat().st_size > 10_000


def test_a_deadline_names_what_it_leaves_out(tmp_path) -> None:
    path = tmp_path / "r.csv"
    program.main(["side_attention", "--quick", "--deadline", "0", "--csv", str(path)])
    assert len(results.left_out(path)) == 4
    assert results.read(path) == []


def test_rows_are_read_as_they_were_written(tmp_path) -> None:
    """A commit of digits and a version stay text; "nan" stays what a GPU's record says."""
    rows = [
        {"problem": "a, b", "commit": "1234567", "torch": "2.13", "p50_ms": 1.25, "rounds": 3},
        {"problem": 'say "c"', "commit": "0012345", "torch": "", "p50_ms": None, "rounds": "nan"},
    ]
    rows = [{**r, "ok": i == 0, "shape": "# no comment"} for i, r in enumerate(rows)]
    results.write(tmp_path / "r.csv", rows, ["what the deadline cut"])
    assert results.read(tmp_path / "r.csv") == rows
    assert results.left_out(tmp_path / "r.csv") == ["what the deadline cut"]


def test_plots_of_a_sweep(tmp_path) -> None:
    """Cost against keys, with the floor as a line."""
    rows = []
    for keys in (64, 128):
        problem = problems.side_attention(
            problems.TINY, torch.float32, shape="quick", rows=2, keys=keys
        )
        rows += measured(problem, ceilings={"bandwidth": 1e9, "float32": 1e9})
    rows = [{**r, "device": "cpu", "processor": "", "threads": 1, "torch": "", "commit": "",
             "date": ""} for r in rows]  # fmt: skip
    assert {p.name for p in plots.draw(rows, tmp_path)} == {
        "side_attention.png",
        "side_attention_keys.png",
    }
    assert all(r["percent_of_floor"] > 0 for r in rows if r["p50_ms"])


RESULTS = sorted((Path(problems.__file__).parent / "results").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_results_say_where_they_come_from(path: Path) -> None:
    rows = results.read(path)
    assert {r["status"].split(":")[0] for r in rows} <= {"timed", "refused", "out of memory"}
    assert len({r["commit"] for r in rows}) == 1
    assert not any(r["commit"].endswith("-dirty") for r in rows)
    assert all(r["date"] and r["torch"] and r["threads"] and r["processor"] for r in rows)
    assert f"`{path.stem}`" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_unknown_op() -> None:
    with pytest.raises(SystemExit):
        program.main(["attention", "--quick"])
