"""Walks every call of a scenario: each fault it can meet, and the same command again after it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace

from tests.faults import tree
from tests.faults.checks import (
    Recovery,
    artifacts,
    ending,
    enough,
    passed_over,
    recovery,
)
from tests.faults.client import Point, Server
from tests.faults.power import Logged, State, read_log, states
from tests.faults.scenarios import Scenario, Wanted, reference

# What a path is part of, by how it begins below the output folder.
_PHASES = (
    (r"metrics\.jsonl", "metrics"),
    (r"(saving/(replaced-)?)?model", "final model"),
    (r"abandoned", "rollback"),
    (r"checkpoint-|saving", "save"),
    (r"evaluation-", "evaluation"),
    (r"groundkern\.json", "record"),
    (r"report\.html", "report"),
    (r"index", "index"),
    (r"run\.lock", "lock"),
)


@dataclass(frozen=True)
class Failure:
    """A point that did not survive, with all that is needed to see it again."""

    scenario: str
    number: int
    kind: str
    call: str
    problem: str
    printed: str

    def __str__(self) -> str:
        again = f'--scenario "{self.scenario}" --point {self.number} --kind "{self.kind}"'
        return f"{self.problem}\n    {self.call}\n    python -m tests.faults {again}"


@dataclass
class Results:
    """Counts by (scenario and phase, kind), and the failures.

    Args:
        tried, failed: faults.
        states: different folders that faults left, in each of which the run was started again.
        continued: different folders among them once the run had tidied up, each run to its end.
    """

    tried: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    states: int = 0
    continued: int = 0


Fault = tuple[int, str, str]  # the number of a call, the kind, the phase


def phase(path: str, saved: list[int]) -> str:
    """What a call on a path is part of; first and later saves are told apart."""
    below = path.removeprefix("run").lstrip("/")
    for pattern, name in _PHASES:
        if re.match(pattern, below):
            later = "later save" if saved else "first save"
            return later if name == "save" else name
    return "folder"


def file_kind(path: str) -> str:
    """A path with its numbers and random parts replaced."""
    return re.sub(r"\.tmp\w+|\d+", "*", path)


class Walk:
    """One scenario, walked.

    Args:
        server: where runs come from.
        scenario: what is walked.
        results: what is added to.
    """

    def __init__(self, server: Server, scenario: Scenario, results: Results):
        self.server, self.scenario, self.results = server, scenario, results
        self.name = scenario.name
        self.wanted: Wanted = reference(server, scenario)
        self._recovered: dict[str, Recovery] = {}  # by the folder that the fault left
        self._continued: dict[str, Recovery] = {}  # by the folder when the model was loaded
        self._states: list[State] = []
        self._printed = ""

    def points(self) -> dict[Fault, Point]:
        """Every fault that can happen, and its call, without letting any happen."""
        return {
            (point.number, kind, phase(point.path, point.saved)): point
            for point in self._walked()
            for kind in point.kinds
        }

    def power_points(self, seed: int, at: Container[int] | None = None) -> list[Fault]:
        """Every folder that a power failure can leave.

        Args:
            seed: of what is chosen at random.
            at: the numbers of the calls to stop after; None: each.
        """
        log, base = self.log(), self.wanted.base
        self._states = list(states(base, self.server.root, log, seed, at))
        return [(s.number, s.kind, phase(s.path, s.saved)) for s in self._states]

    def faults(self, chosen: Callable[[Fault], bool], tell: Callable[[], None]) -> None:
        """Let each chosen fault happen, and check.

        Args:
            chosen: says which of `points`.
            tell: called after each.
        """
        for point in self._walked():
            for kind in point.kinds:
                if chosen((point.number, kind, phase(point.path, point.saved))):
                    self._try(point, kind)
                    tell()

    def power_failures(self, chosen: Callable[[Fault], bool], tell: Callable[[], None]) -> None:
        """Check each chosen folder that a power failure can leave.

        Args:
            chosen: says which of the last `power_points`.
            tell: called after each.
        """
        for state in self._states:
            part = phase(state.path, state.saved)
            if chosen((state.number, state.kind, part)):
                state.write(self.server.root)
                found = artifacts(self.server.output, self.wanted, self._floor(state.saved))
                found += self._check_recovery(state.saved, "")
                self._add(state.number, state.kind, f"after {state.op} {state.path}", part, found)
                tell()

    def log(self) -> list[Logged]:
        """The calls of the run without a fault, whose folder is left as it is."""
        tree.replace(self.server.root, self.wanted.base)
        log = self.server.place / "log"
        self.server.run([*self.scenario.words], mode="log", log=str(log), **self.scenario.options)
        return list(read_log(log))

    def _walked(self) -> Iterator[Point]:
        tree.replace(self.server.root, self.wanted.base)
        return self.server.walk([*self.scenario.words], **self.scenario.options)

    def _try(self, point: Point, kind: str) -> None:
        output = self.server.output
        for ended in point.meet(kind):
            found = ending(kind, point.op, point.path, ended, output, self.wanted)
            found += artifacts(output, self.wanted, self._floor(point.saved))
            found += self._check_recovery(point.saved, ended.printed)
        call = f"{point.op} {point.path} {point.other}".strip()
        self._add(point.number, kind, call, phase(point.path, point.saved), found)

    def _check_recovery(self, saved: list[int], printed: str) -> list[str]:
        """The same command again, unless it has already been given in the same folder."""
        state = tree.digest(self.server.root)
        if state not in self._recovered:
            before = tree.names(self.server.output) if self.server.output.exists() else []
            self._recovered[state] = self._recover(before)
            self.results.states += 1
        found = self._recovered[state]
        self._printed = f"{printed}\n--- the same command again ---\n{found.printed}"
        return [*found.problems, *enough(found, self.scenario, saved, printed)]

    def _recover(self, before: list[str]) -> Recovery:
        """The run is made to its end unless an earlier one had the same folder to load from."""
        ended = self.server.run([*self.scenario.again], known=self._continued)
        if ended.known:
            found = self._continued[ended.folder]
            missed = passed_over(ended.printed + found.printed, before, found.step)
            return replace(found, problems=(*found.problems, *missed))
        found = recovery(ended, before, self.server.output, self.wanted)
        if ended.folder:
            self._continued[ended.folder] = found
            self.results.continued += 1
        return found

    def _floor(self, saved: list[int]) -> int:
        return max(saved, default=self.scenario.saved_before)

    def _add(self, number: int, kind: str, call: str, part: str, problems: list[str]) -> None:
        where = (f"{self.scenario.name}: {part}", kind)
        self.results.tried[where] += 1
        if problems:
            self.results.failed[where] += 1
            said = "; ".join(problems)
            failure = Failure(self.scenario.name, number, kind, call, said, self._printed)
            self.results.failures.append(failure)
