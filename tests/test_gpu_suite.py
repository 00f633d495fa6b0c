"""The parts of `make gpu`: its record, its schedule, its calls, the tile sweep on a played
clock."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import lines
from benchmarks.gpu.supervising import inject, schedule
from groundkern import available_backends

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from benchmarks import problems
from benchmarks.contestants import admission
from benchmarks.gpu import calls
from benchmarks.gpu.devices import dry_runs
from benchmarks.gpu.devices.stand_in import StandIn
from benchmarks.gpu.steps import sweep, worker
from benchmarks.gpu.supervising.clock import PlayedClock
from benchmarks.launches.noting import noted

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
INTERPRETED = not torch.cuda.is_available()


def test_a_line_is_on_disk_at_once_and_in_plain_json(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    record = lines.Lines(path, "smoke", lambda: 1.23456)
    record.write("smoke", error=float("nan"), allowed=float("inf"), low=-float("inf"), n=(1, None))
    line = json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(x))
    assert line == {
        "t": 1.235,
        "step": "smoke",
        "event": "smoke",
        "error": "nan",
        "allowed": "inf",
        "low": "-inf",
        "n": [1, None],
    }


def test_a_broken_record_is_read_as_far_as_it_goes(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    record = lines.Lines(path, "loss", lambda: 0.0)
    record.write("start", case="a")
    record.write("done", case="a")
    record.write("start", case="b")
    with path.open("a") as file:
        file.write('[1]\n{"t": 3, "step": "lo')
    found, wrong = lines.read(path)
    assert [x["event"] for x in found] == ["start", "done", "start"]
    assert ["is no line of a run" in wrong[0], "is not JSON" in wrong[1]] == [True, True]
    assert lines.in_flight(found, "loss") == "b"
    assert lines.in_flight(found[:2], "loss") is None
    assert lines.started(found, "loss") == {"a", "b"}
    assert lines.started(found, "smoke") == set()
    assert lines.read(tmp_path / "none") == ([], [])


@pytest.mark.parametrize("name", schedule.CALLS)
def test_a_call_has_room_for_its_steps(name: str) -> None:
    steps = schedule.CALLS[name]
    assert len({x.name for x in steps}) == len(steps)
    assert {x.name for x in steps} <= set(schedule.STEPS)
    before = set()
    for step in steps:
        assert not step.waits_for or step.waits_for in before
        before |= {step.name} if step.background else set()
        assert step.name in worker.MODULES or step.command
        assert step.case_limit > 0
    tests = [x.name for x in steps].index("tests")
    waited = [x.limit for x in steps[:tests] if not x.background]
    assert sum(waited) <= schedule.SECONDS, "even if each takes all it may, the tests begin"


def test_the_documented_steps_are_the_plan() -> None:
    text = (ROOT / "docs" / "ops" / "gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes)? ?\| (yes)? ?\|$", text, re.MULTILINE)
    for column, name in enumerate(schedule.CALLS, 1):
        said = {row[0] for row in rows if row[column]}
        assert said == {step.name for step in schedule.CALLS[name]}


@pytest.mark.parametrize("text", ["smoke", "smoke=boom", "=crash", "smoke#x=crash", ""])
def test_a_failure_that_there_is_none_of(text: str) -> None:
    with pytest.raises(ValueError, match="--inject: expected STEP"):
        inject.parse(text)


ALL = [*calls.smoke(), *calls.attention(), *calls.loss(), *calls.compared()]


def test_calls_have_names_of_their_own() -> None:
    for some in (calls.smoke, calls.attention, calls.loss, calls.compared):
        names = [x.name for x in some()]
        assert len(set(names)) == len(names)
    for sized in ALL:
        assert sized.real.op == sized.small.op
        assert sized.real.floor("full").seconds(3e12, 7e14) > sized.small.floor("full").seconds(
            3e12, 7e14
        )


@pytest.mark.parametrize("sized", list(calls.smoke())[:16], ids=lambda x: x.name)
@pytest.mark.skipif(not INTERPRETED, reason="launches are noted in the interpreter here")
def test_a_dry_run_launches_what_the_call_launches(sized: calls.Sized, monkeypatch) -> None:
    """On meta tensors the launchers launch the same kernels in the same order as on real ones, with
    tensors of the same sizes and with the same numbers."""
    # as many splits on both
    monkeypatch.setattr("groundkern.tiles.processors", lambda device: 132)
    call = sized.small.make(CPU)
    run, _ = admission.runner(call, admission.ours(call, "triton"), "full")
    with noted(launch=False) as seen:
        run()
    dry = dry_runs.dry(sized.small)
    assert [x.name for x in dry] == [x.name for x in seen]
    for a, b in zip(dry, seen, strict=True):
        assert a.options == b.options
        assert [_size(x) for x in a.arguments] == [_size(x) for x in b.arguments]


def _size(x: object) -> object:
    if isinstance(x, tuple):  # a NamedTuple of tensors and strides
        return [_size(part) for part in x]
    return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


def test_a_launch_is_made_again_on_copies() -> None:
    call = calls._sized(problems.side_attention, calls.SEVEN, rows=4, keys=64).small
    run, _ = admission.runner(call.make(CPU), _ours(call), "full")
    with noted() as seen:
        _, (dq, *_) = run()
    reduce = next(x for x in seen if x.name == "sum_kernel")
    assert any(x is not y for x, y in zip(reduce.aside(0).arguments, reduce.arguments, strict=True))
    assert all(x is y for x, y in zip(reduce.aside().arguments, reduce.arguments, strict=True))
    written = next(
        x for x in reduce.arguments if isinstance(x, torch.Tensor) and x.shape == dq.shape
    )
    before, copied = written.clone(), reduce.aside(0)
    written.zero_()
    copied.again()
    assert not written.any(), "the copies were written, not what the call had"
    reduce.again()
    assert torch.equal(written, before)


def _ours(problem):
    call = problem.make(CPU)
    return admission.ours(call, "triton")


COMPILE_KEYS = """
from dataclasses import replace
import torch
from benchmarks import problems
from benchmarks.gpu.devices import dry_runs
from benchmarks.gpu import calls
from benchmarks.gpu.steps import sweep
from groundkern.tiles import Tile
dry_runs.compile_for(90)

def keys(rows, keys, tile=None):
    make = problems.side_attention
    problem = make(calls.SEVEN, torch.bfloat16, shape="s", rows=rows, keys=keys)
    return {dry_runs.compile_key(x) for x in dry_runs.dry(problem)}

of_a_tile_row = [
    ((64, 4096), (64, 33)), ((64, 4096), (129, 40000)),
    ((1, 4096), (2, 33)), ((3, 4096), (9, 40000)),
]
print(*(len(keys(*other) - keys(*one)) for one, other in of_a_tile_row))
same = keys(9, 4096)
bucket = next(calls.buckets())
with sweep.replaced(bucket, "backward", Tile(16, 64, 4, 3)):
    print(len(keys(9, 4096) - same))
launch = dry_runs.dry(bucket.call.small)[0]
kernel = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
print(sorted({"cubin", "ptx", "ttgir"} & set(kernel.asm)))
"""


@pytest.mark.long
def test_sizes_make_no_other_kernels_and_tiles_do(tmp_path) -> None:
    """In a process of its own: Triton is imported here without its interpreter."""
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_KEYS],
        cwd=ROOT,
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sizes, tiles, kinds = done.stdout.splitlines()
    assert sizes.split() == ["0", "0", "0", "0"]
    assert tiles == "1", "the backward; the plan's kernels have the forward's tiles"
    assert kinds == "['cubin', 'ptx', 'ttgir']"
    assert list(tmp_path.rglob("*.cubin")), "it lies where the runtime looks"


AHEAD = """
import sys
from types import SimpleNamespace
from unittest import mock
import torch
from triton.runtime.driver import driver
from benchmarks.contestants import admission
from benchmarks.gpu.devices import dry_runs
from benchmarks.gpu import calls
from groundkern import backends

some = [x for x in calls.smoke() if x.real.rows == 1][3:14:5] + list(calls.loss())[:1]
dry_runs.compile_for(90)
if sys.argv[1] == "ahead":
    dry = [x for sized in some for x in dry_runs.dry(sized.small)]
    for launch in dry_runs.distinct(dry):
        launch.compile()
else:
    # Triton's whole way to a launch, but for the last step: a driver that is played loads nothing.
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132}
    driver.active.utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: properties
    )
    launched = []
    driver.active.launcher_cls = lambda src, metadata: lambda *_: launched.append(metadata.name)
    with mock.patch.object(backends, "choose", return_value="triton"):
        for sized in some:
            call = sized.small.make(torch.device("cpu"))
            run, _ = admission.runner(call, admission.ours(call, "triton"), "full")
            run()
    assert len(launched) >= 25, len(launched)
"""


@pytest.mark.long
def test_what_is_compiled_ahead_is_what_is_launched(tmp_path) -> None:
    """Otherwise a card would compile everything again, one by one. On CPU tensors, for whose
    addresses and strides Triton specialises as it does for a GPU's."""
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    found = []
    for when in ("ahead", "launch"):
        arguments = [sys.executable, "-c", AHEAD, when]
        done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append({x.parent for x in tmp_path.rglob("*.cubin")})
    assert len(found[0]) > 15
    assert found[1] == found[0], "nothing was left to compile"


BUCKETS = {f"{b.op}-{kind}-{b.most}": (b, kind) for b in calls.buckets() for kind in b.kinds()}


@pytest.mark.parametrize("name", BUCKETS)
def test_candidates_fit_their_bucket(name: str) -> None:
    bucket, kind = BUCKETS[name]
    rows = bucket.call.real.rows * 7  # query heads of a KV head
    assert bucket.most is None or rows <= bucket.most
    found = sweep.candidates(bucket, kind)
    assert len(set(found)) == len(found) >= 15
    assert all(x.block_n % 32 == 0 and x.block_m * x.block_n <= 8192 for x in found)
    assert {x.stages for x in found} == {2, 3, 4}


def test_a_row_is_replaced_for_its_bucket_and_put_back() -> None:
    bucket, kind = BUCKETS["side_attention-backward-64"]
    table = sweep.TABLES["side_attention"]
    before, tile = dict(table), sweep.Tile(16, 128, 8, 4)
    with sweep.replaced(bucket, kind, tile):
        served = [sweep.tile_key(table, ("backward", False), [128], n) for n in (63, 65)]
        assert [table[key] == tile for key in served] == [True, False]
    assert table == before


class _Played(StandIn):
    """Plays the seconds of chosen tiles."""

    def __init__(self, clock: PlayedClock, seconds: dict, broken: sweep.Tile) -> None:
        super().__init__(clock)
        self.seconds, self.broken = seconds, broken

    def seconds_of(self, launch, *, rounds, expected, label):
        self.spend(0.1)
        if label == str(self.broken):
            raise RuntimeError("out of resource: shared memory")
        return self.seconds.get(label, 1e-3)


def _swept(tmp_path, seconds: dict, broken, until: float = 1e9) -> list[lines.Line]:
    bucket, kind = BUCKETS["side_attention-forward-64"]
    clock = PlayedClock()
    record = lines.Lines(tmp_path / "r.jsonl", "tiles", clock.now)
    device = _Played(clock, seconds, broken)
    context = worker.Context(schedule.TILES, device, clock, record, tmp_path, until)
    sweep._sweep(context, bucket, kind)
    return context.before()


@pytest.mark.skipif(not INTERPRETED, reason="calls run in the interpreter here")
def test_the_fastest_tile_is_proposed(tmp_path) -> None:
    present = sweep.present(*BUCKETS["side_attention-forward-64"])
    best, broken = sweep.Tile(64, 128, 4, 3), sweep.Tile(64, 64, 4, 2)
    found = _swept(tmp_path, {str(best): 5e-4}, broken)
    (last,) = [x for x in found if x["event"] == "best"]
    assert (last["tile"], last["us"]) == (list(best), 500.0)
    assert (last["present_tile"], last["present_us"]) == (list(present), 1000.0)
    assert last["key"] == ["forward", False, 128, 64]
    out = [x for x in found if x["event"] == "tile" and x["us"] is None]
    assert [x["tile"] for x in out] == [list(broken)]
    assert "out of resource" in out[0]["status"]


@pytest.mark.skipif(not INTERPRETED, reason="calls run in the interpreter here")
def test_the_present_tile_stays_unless_another_is_clearly_faster(tmp_path) -> None:
    present = sweep.present(*BUCKETS["side_attention-forward-64"])
    found = _swept(
        tmp_path, {str(sweep.Tile(64, 128, 4, 3)): 9.8e-4}, sweep.Tile(64, 64, 4, 2), until=6.0
    )
    (last,) = [x for x in found if x["event"] == "best"]
    assert last["tile"] == last["present_tile"] == list(present)
    notes = [x["text"] for x in found if x["event"] == "note"]
    assert notes == ["the screening was cut short: the step's time was over"]


@pytest.mark.parametrize("name", [x for x in BUCKETS if x.startswith("side")])
@pytest.mark.skipif(not INTERPRETED, reason="calls run in the interpreter here")
def test_a_bucket_uses_the_row_that_is_swept(name: str) -> None:
    """So does its small twin: with another tile in the row, its kernel is launched with it."""
    bucket, kind = BUCKETS[name]
    present = sweep.present(bucket, kind)
    tile = present._replace(warps=12 - present.warps)  # 4 or 8
    for problem in (bucket.call.real, bucket.call.small):
        with sweep.replaced(bucket, kind, tile):
            seen = dry_runs.dry(problem, bucket.kinds()[kind])
        used = [x.options["num_warps"] for x in seen if bucket.uses(kind, x)]
        assert used == [tile.warps], problem.name
