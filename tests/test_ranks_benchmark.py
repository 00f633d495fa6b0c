"""`python -m benchmarks.ranks` and its kills: they find what differs, and today nothing does."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.ranks import __main__ as ranks
from benchmarks.ranks import kills, packing
from benchmarks.ranks.cases import OPTIMIZERS, RANKS, STRATEGIES, cases, context_cases, parsed
from benchmarks.ranks.launching import marked, started
from benchmarks.ranks.samples import BATCH, ODD_ONE, examples
from benchmarks.ranks.table import compared

CASES = [make(STRATEGIES, RANKS, OPTIMIZERS) for make in (cases, context_cases)]
CASES = [case for made in CASES for case in made]


def test_every_case_is_found_again_by_its_key():
    assert [parsed(case.key) for case in CASES] == CASES
    assert len({case.key for case in CASES}) == len(CASES)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_second_rank_lacks_what_the_case_says_and_no_other_does(ranks):
    made = zip(*(examples(ranks, share) for share in ("alike", "imageless", "rowless")))
    for number, (every, imageless, rowless) in enumerate(made):
        odd = number // BATCH % ranks == ODD_ONE
        assert len(imageless.images) == (0 if odd else len(every.images))
        assert [e.messages[1]["train"] for e in (every, imageless)] == [True, True]
        assert rowless.messages[1]["train"] is not odd
        assert every.images or number % BATCH  # an image in every micro-batch


def result(weight: float = 1.0, loss: float = 2.0) -> dict:
    weights = {"head": torch.tensor([weight, 0.5])}
    log = [{"loss": loss, "word": 0.0, "epoch": 1.0}]
    return {"weights": weights, "begun": {"head": torch.zeros(2)}, "log": log}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (result(), "equal"),
        (result(weight=1 + 5e-6, loss=2 - 1e-5), "equal"),
        (result(weight=1 + 2e-5), "differs"),
        (result(loss=2 + 5e-5), "differs"),
        (result(weight=math.nan), "differs"),
        (result(loss=math.nan), "differs"),
        ({**result(), "weights": {}}, "failed"),
        ({**result(), "log": [{"loss": 2.0}]}, "failed"),
    ],
)
def test_a_case_that_differs_is_not_equal(found, status):
    assert compared(CASES[0], found, result()).status == status


def test_only_what_a_benchmark_started_is_ended(tmp_path):
    def until(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(marked(tmp_path)) != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    sleeps = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(sleeps) as other:  # names the folder, as `timeout` in front of it does
        try:
            with started(["bash", "-c", "sleep 60 & sleep 60; true"], tmp_path, tmp_path / "log"):
                until(3)
                assert other.pid not in marked(tmp_path)
            until(0)
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.long
def test_two_ranks_equal_one_process():
    words = ["--strategies", "ddp", "--ranks", "2", "--only", "full"]
    assert ranks.main(words) == 0


@pytest.mark.long
def test_a_killed_rank_ends_the_others_and_the_run_continues_with_the_same_bits():
    words = ["--moments", "backward", "writing", "--killed", "1", "--continue-on", "2", "4"]
    assert kills.main(words) == 0


@pytest.mark.long
def test_packed_batches_have_the_losses_of_padded_ones():
    assert packing.main(["--steps", "1", "--batch-size", "8", "--rounds", "1"]) == 0
