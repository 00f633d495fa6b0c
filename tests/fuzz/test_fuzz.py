"""The corpus and seeded inputs of every target: documented errors alone, no wrong results.

`python -m tests.fuzz` draws as many more as one likes.
"""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.fuzz.running import CORPUS, Failure, attempt, corpus, drawn
from tests.fuzz.target import Target, Wrong, sentence
from tests.fuzz.targets import targets

INPUTS = 10  # of a target of share 1
MOST = 200  # of any target


@pytest.mark.parametrize("name", targets())
def test_corpus_and_seeded_inputs(name):
    target = targets()[name]
    cases = list(corpus(target))
    count = min(MOST, round(INPUTS * target.share))
    cases += [(f"--only {i}", drawn(target, 0, i)) for i in range(count)]
    results = [(which, attempt(target, data)) for which, data in cases]
    failed = [f"{which}: {r.what}" for which, r in results if isinstance(r, Failure)]
    assert not failed
    assert any(result for _, result in results), "an input that is accepted"


@pytest.mark.parametrize("name", targets())
def test_seeds_are_valid(name):
    target = targets()[name]
    taken = [attempt(target, data) is True for data in target.seeds.values()]
    assert any(taken)
    assert sum(taken) >= len(taken) - 1, "all but at most one, which is there to be refused"


def test_every_case_belongs_to_a_target():
    assert {path.name for path in CORPUS.iterdir()} <= set(targets())


def _target(check) -> Target:
    return Target("t", check, {"one": b'{"a": [1, 2, 3], "b": "xy"}'}, "json")


def _raises(error):
    def check(data: bytes) -> bool:
        raise error

    return check


@pytest.mark.parametrize("error", [KeyError("x"), Wrong("a wrong result"), RecursionError()])
def test_an_undocumented_error_is_a_failure(error):
    result = attempt(_target(_raises(error)), b"")
    assert isinstance(result, Failure)
    assert type(error).__name__ in result.what


def test_a_slow_input_is_a_failure(monkeypatch):
    monkeypatch.setattr("tests.fuzz.running.SECONDS", 0.05)

    def check(data: bytes) -> bool:
        while True:
            with suppress(Exception):  # as a parser that catches everything
                sum(range(1000))

    assert attempt(_target(check), b"").signature == "too slow"


@pytest.mark.parametrize("message", ["a\u2028b", "a\nb", "x" * 1001, "\ud800", " "])
def test_messages_that_are_not_fit_to_be_shown(message):
    with pytest.raises(Wrong):
        sentence(message)


def test_inputs_are_the_same_for_the_same_seed():
    for target in targets().values():
        first, second = ([drawn(target, seed, i) for i in range(20)] for seed in (3, 3))
        assert first == second
        assert len(set(first)) > 10


def test_a_failing_input_is_made_small():
    from tests.fuzz.minimising import minimise

    def check(data: bytes) -> bool:
        if b"needle" in data:
            raise KeyError("found")
        return True

    target = _target(check)
    big = b'{"a": [1, {"q": "hay needle hay"}, 3], "b": "xyxyxy"}'
    assert len(minimise(target, attempt(target, big)).data) <= len(b'"needle"')


def test_the_command(capsys, tmp_path):
    from tests.fuzz.__main__ import main

    assert main(["--target", "options", "--inputs", "30", "--corpus", str(tmp_path)]) == 0
    assert "options" in capsys.readouterr().out
    assert main(["--target", "nothing"]) == 2
