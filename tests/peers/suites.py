"""All suites, and what of them is not here, with the reason."""

from collections.abc import Iterator
from typing import NamedTuple

from tests.peers import (
    cut_cross_entropy,
    liger,
    liger_entropy,
    liger_jsd,
    liger_options,
    quack,
    torch_suite,
    vocabulary_parallel,
)
from tests.peers.case import Case

MODULES = (
    torch_suite,
    liger,
    liger_options,
    liger_entropy,
    liger_jsd,
    cut_cross_entropy,
    vocabulary_parallel,
    quack,
)


class Absent(NamedTuple):
    suite: str
    tests: str
    cases: int
    reason: str


ABSENT = [
    Absent(
        cut_cross_entropy.SUITE,
        "`test_indexed_dot`",
        36,
        "a kernel inside the library that gives a target's logit; no call of ours returns it "
        "(log p + lse is it up to the rounding of lse, which passes in 33 of the 36)",
    ),
    Absent(
        liger_entropy.SUITE,
        "dispatch, `test_cutile_*` of chunk sizes and workspaces",
        18,
        "how Liger picks and cuts its GPU kernels",
    ),
]


def cases() -> list[Case]:
    return [case for module in MODULES for case in module.CASES]


def by_test() -> Iterator[tuple[str, str, list[Case]]]:
    """(suite, test, its cases)."""
    for module in MODULES:
        tests: dict[str, list[Case]] = {}
        for case in module.CASES:
            tests.setdefault(case.test, []).append(case)
        for test, found in tests.items():
            yield module.SUITE, test, found
