"""The tile tuner's search, on a clock that is played: nothing here is a measurement."""

import random

import pytest
import torch

from benchmarks import tune
from groundkern import available_backends, tiles
from groundkern.ops.side_attention import cases

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

Tile = tune.Tile
PRESENT = Tile(32, 32, 4)


def _clock(true: dict, noise: float = 0.0):
    """(a timer of the given seconds with one-sided noise, how often each tile was timed)."""
    dice, calls = random.Random(1), {}

    def time(tile: Tile) -> float | None:
        calls[tile] = calls.get(tile, 0) + 1
        seconds = true.get(tile, 10.0)
        return None if seconds is None else seconds * (1 + noise * dice.random())

    return time, calls


def test_the_fastest_tile_is_found_through_noise() -> None:
    best = Tile(64, 64, 8, 3)
    time, calls = _clock({PRESENT: 12.0, best: 7.0, Tile(64, 32, 8): 8.0}, noise=0.1)
    found, medians = tune.search(PRESENT, tune.candidates(), time)
    assert found == best
    assert PRESENT in medians, "what it is compared with is timed to the end"
    often = [n for tile, n in calls.items() if tile not in (PRESENT, best)]
    assert calls[best] == calls[PRESENT] > 4 * min(often), "time goes to the few that are close"


def test_the_present_tile_stays_unless_another_is_clearly_faster() -> None:
    near = Tile(64, 64, 8)
    for seconds, expected in ((0.99, PRESENT), (0.97, near)):
        time, _ = _clock({PRESENT: 1.0, near: seconds})
        assert tune.search(PRESENT, [near, Tile(16, 32, 4)], time)[0] == expected


def test_tiles_that_do_not_run_are_out_and_the_present_one_must() -> None:
    broken, good = Tile(128, 64, 8), Tile(64, 64, 8)
    time, calls = _clock({PRESENT: 1.0, good: 0.5, broken: None})
    found, medians = tune.search(PRESENT, [broken, good], time)
    assert (found, calls[broken]) == (good, 1)
    assert broken not in medians
    with pytest.raises(RuntimeError, match="the present tile"):
        tune.search(broken, [good], time)


def test_a_lonely_table() -> None:
    time, _ = _clock({PRESENT: 1.0})
    assert tune.search(PRESENT, [PRESENT], time) == (PRESENT, {PRESENT: 1.0})


def test_a_row_is_replaced_while_it_is_timed_and_what_changes_results_is_out() -> None:
    """On a call in the interpreter, with the number of keys of a tile for seconds."""
    call = cases.CASES["causal"](torch.float32, torch.device("cpu"))
    table = tune.TABLES["side_attention"]
    key = tune.row_of(table, ("forward", True), 16)
    present = table[key]
    run, _ = tune.harness.runner(call, tune.harness.ours(call, "triton"), "forward")
    time = tune.timer_of(table, key, run, lambda _: float(table[key].block_n))
    assert time(Tile(16, 64, 4)) == 64.0
    assert time(Tile(16, 24, 4)) is None, "no block of Triton's"
    assert table[key] == present
    wrong = tune.timer_of(table, key, _alternating(run), lambda _: 1.0)
    assert wrong(Tile(16, 64, 4)) is None


def _alternating(run):
    """Results that change from call to call."""
    count = 0

    def wrong():
        nonlocal count
        count += 1
        results, gradients = run()
        return [count * x for x in results], gradients

    return wrong


@pytest.mark.parametrize(("dim", "row"), [(128, 128), (72, 127), (64, 64), (200, 255)])
def test_a_row_serves_its_dimensions(dim: int, row: int) -> None:
    table = tune.TABLES["side_attention"]
    assert tiles.tile_key(table, ("dq", False), [dim], 448) == ("dq", False, row)
    assert tiles.tile_key(table, ("dq", False), [dim, 16], 448) == ("dq", False, row)


@pytest.mark.parametrize(
    ("dim", "packed", "row"),
    [(128, 7, (128, 16)), (128, 16, (128, 16)), (100, 17, (128, 64)), (128, 65, (128,)),
     (64, 7, (64,))],
)  # fmt: skip
def test_a_row_for_packed_rows_is_preferred(dim: int, packed: int, row: tuple) -> None:
    table = dict.fromkeys([("dq", 64), ("dq", 128), ("dq", 128, 64), ("dq", 128, 16)], PRESENT)
    table[("dkv", 128, 32)] = PRESENT
    assert tiles.tile_key(table, ("dq",), [dim], packed) == ("dq", *row)


def test_a_printed_row_reads_back() -> None:
    medians = {PRESENT: 2e-6, Tile(64, 64, 8): 1e-6}
    text = tune.line(("dq", False, 128), Tile(64, 64, 8), PRESENT, medians, "a device")
    row, why = text.split("  # ")
    assert eval(f"{{{row}}}", {"Tile": Tile}) == {("dq", False, 128): Tile(64, 64, 8)}
    assert why.startswith("a device, 20") and why.endswith("1.0 us, 2.0 us before")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_tuning_needs_a_gpu(capsys) -> None:
    assert tune.main([]) == 1
    assert "tuning needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["attention"])
