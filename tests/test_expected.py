"""The table of expected times: docs/ops/gpu.md has it, its kernels are those that a call launches,
and a line counted by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import expected, problems
from benchmarks.costs import floors, loss_times, passes
from benchmarks.gpu import calls
from benchmarks.gpu.devices import dry_runs
from benchmarks.launches.noting import Launch


def test_docs_have_this_table(capsys) -> None:
    assert expected.main(["--check"]) == 0, "run: python -m benchmarks.expected --write"
    page = expected.PAGE.read_text(encoding="utf-8")
    assert expected.rewritten(page, expected.Card(rate=700.0)) != page


def _launched(problem: problems.Problem, mode: floors.Mode) -> Counter[str]:
    seen: list[Launch] = dry_runs.dry(problem, mode)
    once = ("tiles_kernel", "live_kernel", "list_kernel", "row_tiles_kernel")  # of the step's plan
    return Counter(f"_{x.name}" for x in seen if x.name not in once)


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_side_attentions_kernels_are_those_that_a_call_launches(rows: int, mode) -> None:
    listed = passes.side_attention(expected._sizes(rows, 32_768), mode)
    problem = problems.side_attention(calls.SEVEN, calls.BF16, shape="7b", rows=rows, keys=32_768)
    assert Counter(x.kernel for x in listed) == _launched(problem, mode)


@pytest.mark.parametrize("mode", ["forward", "full"])
def test_klals_kernels_are_those_that_a_call_launches(mode) -> None:
    listed = passes.attention_kl(expected._sizes(32, 8192, 2048), mode)
    make, sizes = problems.attention_map, {"rows": 32, "keys": 8192, "columns": 2048}
    problem = make(calls.SEVEN, calls.BF16, shape="7b", over="columns", **sizes)
    assert Counter(x.kernel for x in listed) == _launched(problem, mode)


def test_a_forward_by_hand() -> None:
    """8 rows are 56 lanes a KV head: one row tile. Two programs on each processor are 66 splits of
    512 key tiles, of which the longest has 8: 64 splits do. 32 programs merge two lanes each."""
    (forward,) = passes.side_attention(expected._sizes(8, 32_768), "forward")
    lanes, width = 8 * 28, 130
    parts = 64 * lanes * width * 4
    keys = 2 * 4 * 32_768 * 256
    assert forward.programs == 4 * 64
    assert forward.read == 2 * lanes * 128 + keys
    assert forward.written == 2 * 2 * lanes * 128 + 4 * lanes + parts
    assert forward.flops == 2 * 2 * 64 * 32_768 * 128 * 4
    assert forward.merged == 2 * 64 * width * 4
    assert forward.exchanges == 5
    assert forward.busy == pytest.approx(512 / (66 * 8))


def test_a_step_by_hand() -> None:
    """7.07e9 weights in products: 28 layers of 0.233e9 and a head of 0.545e9."""
    weights = 28 * (3584 * 128 * 64 + 3 * 3584 * 18_944) + 3584 * 152_064
    assert expected.steps_products(100) == 600 * weights


def test_what_takes_longer_is_what_bounds() -> None:
    bounds = {(x.case, x.mode): x.bound for x in expected.lines(expected.Card())}
    assert bounds["side attention, 1 row, 128k keys", "forward"] == "memory"
    assert bounds["side attention, 256 rows, 128k keys", "full"] == "matrix"
    slow = expected.Card(graph_us=1000.0)
    assert {x.bound for x in expected.lines(slow) if "32k" in x.case} == {"latency"}


def test_a_loss_by_hand() -> None:
    """4096 x 4096 x 128256: 1.05 GB of logits in one chunk, each read and overwritten once; three
    products of 4.3 TFLOP whose tiles fill the last of their rounds by 97 to 100 %."""
    (head,) = (x for x in loss_times.SHAPES if x.rows == 4096)
    assumed = loss_times.Assumed(4e12, 800e12, 0.0, memory=0.5, clock=1e9, issue=1.0)
    time = loss_times.loss_time(head, 10, assumed)
    assert time.products == time.ours
    assert time.products == pytest.approx(3 * 2 * 4096 * 4096 * 128_256 / 800e12, rel=0.03)
    assert time.bound == "memory"
    assert time.rows == pytest.approx(2 * 2 * 4096 * 128_256 / 2e12)
    slow = loss_times.loss_time(head, 10, replace(assumed, issue=0.1))
    assert slow.bound == "issue"
    instructions = sum(loss_times.INSTRUCTIONS.values()) / 16
    assert slow.rows == pytest.approx(32 * 128_256 * instructions / 128 / 0.1e9)
