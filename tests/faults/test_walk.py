"""A small part of the walk, which `python -m tests.faults` makes in full; and that it can fail."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.faults import plan, power, shim
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


def one_of_each(faults: list[Fault], kind_of: Callable[[str], str]) -> set[Fault]:
    """One fault of each phase and group of kinds, by chance."""
    dice, groups = random.Random(0), {}
    for fault in faults:
        groups.setdefault((fault[2], kind_of(fault[1])), []).append(fault)
    return {dice.choice(group) for group in groups.values()}


def test_the_calls_that_are_seen_make_up_the_folder(walk):
    """No call escapes: replayed with their data, those that were seen give the same files."""
    disk = power.Disk(walk.wanted.base, walk.server.root)
    calls = [logged for logged in walk.log() if logged.call is not None]
    for logged in calls:
        disk.apply(logged)
    root = walk.server.root
    found = {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")
    }
    assert disk.files(power.WRITTEN, random.Random(0)) == found
    assert {"write", "fsync", "rename", "unlink", "rmdir", "mkdir"} < {c.call.op for c in calls}
    assert os.path.getsize(root / "run/checkpoint-3/model.safetensors") > 10**5


def test_every_phase_survives_every_group_of_faults(walk):
    chosen = one_of_each(list(walk.points()), lambda kind: kind.split()[0])
    assert {kind.split()[0] for _, kind, _ in chosen} == {kind.split()[0] for kind in plan.KINDS}
    walk.faults(chosen, nothing)
    assert walk.results.failures == []
    assert sum(walk.results.tried.values()) == len(chosen) > 30


def test_every_phase_survives_a_power_failure(walk):
    chosen = one_of_each(walk.power_points(0), lambda kind: "")
    walk.power_failures(chosen, nothing, 0)
    assert walk.results.failures == []


def test_a_run_that_flushes_nothing_is_found(server):
    walk = start(server, "fresh", sabotage="no flushes")
    last = max(fault for fault in walk.power_points(0) if fault[1] == "power: no bytes")
    walk.power_failures({last}, nothing, 0)
    (failure,) = walk.results.failures
    assert "checkpoint-3 was complete, and step 0 was taken" in failure.problem


def test_a_run_that_writes_in_place_is_found(server):
    walk = start(server, "fresh", sabotage="in place")
    found = [fault for fault in walk.points() if fault[1:] == ("kill inside", "report")]
    walk.faults(set(found[:1]), nothing)
    (failure,) = walk.results.failures
    assert "report.html is there in part" in failure.problem
    assert '--kind "kill inside"' in str(failure)
