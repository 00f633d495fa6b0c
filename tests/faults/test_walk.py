"""A small part of the walk, which `python -m tests.faults` makes in full; and that it can fail."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle

import pytest

from tests.faults import power, shim
from tests.faults.client import Server
from tests.faults.scenarios import scenarios
from tests.faults.walk import Fault, Results, Walk

_REASON = shim.reason_not_to()
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("faults").resolve()) as started:
        yield started


@pytest.fixture(scope="module")
def walk(server) -> Walk:
    return start(server, "fresh")


def start(server: Server, name: str, **options) -> Walk:
    scenario = scenarios(server)[name]
    return Walk(server, replace(scenario, options={**scenario.options, **options}), Results())


def nothing() -> None:
    """Where the command moves its progress bar."""


def one_of_each(faults: Iterable[Fault]) -> set[Fault]:
    """A fault of each phase, a kill and an error in turn."""
    dice, groups = random.Random(0), {}
    for fault in faults:
        groups.setdefault(fault[2], []).append(fault)
    return {
        dice.choice([fault for fault in group if fault[1].startswith(start)])
        for group, start in zip(groups.values(), cycle(("kill", "E")))
    }


def test_the_calls_that_are_seen_make_up_the_folder(walk):
    """No call escapes: replayed with their data, those that were seen give the same files."""
    disk = power.Disk(walk.wanted.base, walk.server.root)
    calls = [logged for logged in walk.log() if logged.call is not None]
    for logged in calls:
        disk.apply(logged)
    root = walk.server.root
    paths = {str(path.relative_to(root)): path for path in root.rglob("*")}
    found = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
    assert disk.files(power.WRITTEN, random.Random(0)) == found
    assert {"write", "fsync", "rename", "unlink", "rmdir", "mkdir"} < {c.call.op for c in calls}
    assert (root / "run/checkpoint-3/model.safetensors").stat().st_size > 10**5


def test_every_phase_survives_a_fault(walk):
    chosen = one_of_each(walk.points())
    phases = {part for _, _, part in chosen}
    assert {"first save", "later save", "final model", "metrics", "record", "report"} < phases
    walk.faults(chosen.__contains__, nothing)
    assert walk.results.failures == []
    assert sum(walk.results.tried.values()) == len(chosen) == len(phases)


def test_power_failures_are_survived(walk):
    calls = sum(logged.call is not None for logged in walk.log())
    dice = random.Random(0)
    at = {calls, *dice.sample(range(calls), 4)}
    chosen = dice.sample(walk.power_points(0, at), 4)
    tried = sum(walk.results.tried.values())
    walk.power_failures(chosen.__contains__, nothing)
    assert walk.results.failures == []
    assert sum(walk.results.tried.values()) == tried + 4


@pytest.mark.long
def test_a_run_that_flushes_nothing_is_found(server):
    walk = start(server, "fresh", sabotage="no flushes")
    last = sum(logged.call is not None for logged in walk.log())
    walk.power_points(0, {last})
    walk.power_failures(lambda fault: fault[1] == "power: no bytes", nothing)
    (failure,) = walk.results.failures
    assert "and step 0 was taken" in failure.problem or "cannot go on" in failure.problem


@pytest.mark.long
def test_a_run_that_writes_in_place_is_found(server):
    walk = start(server, "fresh", sabotage="in place")
    walk.faults(lambda fault: fault[1:] == ("kill inside", "report"), nothing)
    (failure,) = walk.results.failures
    assert "report.html is there in part" in failure.problem
    assert '--kind "kill inside"' in str(failure)
