"""Run every case at its full size and print the table: `python -m tests.peers`."""

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from tests.peers import suites
from tests.peers.case import Case, served_by


@dataclass
class Tally:
    """One row of the table."""

    cases: int = 0
    failures: list[str] = field(default_factory=list)
    served: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def run(self, case: Case, backend: str, full: bool) -> None:
        """Add one case."""
        start = time.monotonic()
        with served_by(backend) as served:
            try:
                case.run(full)
            except Exception as error:
                self.failures.append(f"{case.name}: {type(error).__name__}: {error}")
        self.seconds += time.monotonic() - start
        self.cases += 1
        self.served.update(served)


def _cut(case: Case, most: int | None) -> Case:
    v = case.values
    if most is None or "T" not in v or v["B"] * v["T"] <= most:
        return case
    return replace(case, values={**v, "T": max(1, most // v["B"])})


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| suite | cases | pass | not here |", "|---|---|---|---|"]
    total = Counter()
    for suite, tally in tallies.items():
        absent = sum(row.cases for row in suites.ABSENT if row.suite == suite)
        passed = tally.cases - len(tally.failures)
        lines.append(f"| {suite} | {tally.cases} | {passed} | {absent} |")
        total.update(cases=tally.cases, passed=passed, absent=absent)
    lines.append(f"| all | {total['cases']} | {total['passed']} | {total['absent']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--backend", default="native", choices=("native", "reference", "triton"))
    parser.add_argument("--suite", default="", help="only suites whose name has this in it")
    parser.add_argument("--small", action="store_true", help="the sizes that CI runs")
    parser.add_argument("--most-rows", type=int, help="cut Liger's larger batches to so many rows")
    arguments = parser.parse_args()
    tallies: dict[str, Tally] = {}
    for suite, test, cases in suites.by_test():
        if arguments.suite.lower() not in suite.lower():
            continue
        tally, before = tallies.setdefault(suite, Tally()), time.monotonic()
        known = len(tally.failures)
        for case in cases:
            case = _cut(case, arguments.most_rows)
            tally.run(case, arguments.backend, not arguments.small)
        failed = tally.failures[known:]
        seconds = time.monotonic() - before
        print(
            f"{suite}: {test}: {len(cases)} cases, {len(failed)} failed, {seconds:.0f} s",
            flush=True,
        )
        print("".join(f"    {line}\n" for line in failed), end="")
    print(f"\ntorch {torch.__version__}, {arguments.backend}\n\n{table(tallies)}\n")
    for row in suites.ABSENT:
        print(f"- {row.suite}, {row.tests} ({row.cases}): {row.reason}")
    for suite, tally in tallies.items():
        print(f"{suite}: {dict(tally.served)}, {tally.seconds:.0f} s")
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
