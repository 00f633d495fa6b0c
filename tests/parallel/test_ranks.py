"""groundkern.parallel on several gloo processes: `checks` says what has to hold."""

from __future__ import annotations

import re
import sys

import pytest

from tests.hf.launching import run
from tests.parallel.checks import CHECKS, LONG

MODULE = (sys.executable, "-m")


@pytest.fixture(scope="module")
def passed() -> set[str]:
    output = run("tests.parallel.ranks", launcher=MODULE)
    return set(re.findall(r"^passed (\w+)", output, re.MULTILINE))


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_processes(passed, check: str) -> None:
    assert check in passed


@pytest.mark.long
@pytest.mark.parametrize("check", LONG)
def test_on_four_processes_and_slowly(check: str) -> None:
    assert f"passed {check}" in run("tests.parallel.ranks", check, launcher=MODULE)


@pytest.mark.long
@pytest.mark.parametrize(("first", "dtype"), [(0, "float64"), (700, "float64"), (0, "float32")])
def test_random_calls_on_two_to_four_processes(first: int, dtype: str) -> None:
    words = ("--calls", "300", "--first", str(first), "--dtype", dtype)
    output = run("tests.parallel.random_calls", *words, launcher=MODULE)
    assert output.count("300 calls") == 4
