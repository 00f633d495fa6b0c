"""Some cases of every test of the other libraries, at reduced sizes."""

import functools
import os
from collections import Counter

import pytest
import torch

from groundkern import available_backends
from tests.peers import liger, suites
from tests.peers.case import Case, served_by, some

MOST = 6  # cases of a test
FEW = 1
TESTS = {f"{suite}: {test}": cases for suite, test, cases in suites.by_test()}
ONCE = ("test_vocab_parallel", "torch_compile_dispatch", "errors")  # slow, or of the adapters


@functools.cache
def _chosen(test: str, most: int) -> list[Case]:
    return some(TESTS[test], most)


def _run(cases: list[Case], backend: str) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    failures = []
    for case in cases:
        try:
            with served_by(backend):
                case.run(full=False)
        except AssertionError as error:
            failures.append(f"{case.name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("test", TESTS)
def test_cases_of_other_suites(test: str) -> None:
    _run(_chosen(test, MOST), "native")


@pytest.mark.parametrize("test", [name for name in TESTS if not name.endswith(ONCE)])
def test_cases_in_the_reference(test: str) -> None:
    _run(_chosen(test, MOST)[:FEW], "reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_cases_in_the_interpreter() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    tiny = [case for case in liger.CASES if case.values.get("H") == 8]
    _run(some(tiny, 2)[:2], "triton")


def test_every_suite_has_all_its_cases() -> None:
    counts = Counter(case.suite for case in suites.cases())
    assert counts == {
        "torch linear_cross_entropy": 4839,
        "Liger fused linear cross entropy": 141,
        "Liger cross entropy": 185,
        "Liger fused linear scaled cross entropy": 7,
        "Liger fused linear JSD": 58,
        "cut-cross-entropy": 2931,
        "cut-cross-entropy, sharded": 20,
        "QuACK linear cross entropy": 110,
    }
    assert {row.suite for row in suites.ABSENT} <= set(counts)


def test_every_value_of_every_parameter_is_among_the_chosen() -> None:
    def values(cases: list[Case]) -> set:
        return {(name, str(value)) for case in cases for name, value in case.values.items()}

    missing = {test: values(cases) - values(_chosen(test, MOST)) for test, cases in TESTS.items()}
    assert not any(missing.values()), missing
    assert sum(len(_chosen(test, MOST)) for test in TESTS) < 600
