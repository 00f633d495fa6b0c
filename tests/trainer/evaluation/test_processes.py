"""Several processes of one evaluation: the same results as one, and none that waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from groundkern.trainer.program import main
from groundkern.trainer.ranks import Ranks
from tests.hf.launching import ROOT, TORCHRUN
from tests.trainer.evaluation.small import make, predictions, result, run, words

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have
ALONE = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return make(tmp_path_factory.mktemp("processes"))


def start(command: list[str], **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.mark.long
def test_two_processes_agree_with_one(where, tmp_path):
    more = ("--batch-size", "1", "--failures", "2")
    assert run(where, tmp_path / "one", *more, full=True) == 0
    command = words(where, tmp_path / "two", *more, full=True)
    done = start([*TORCHRUN, "-m", "groundkern", *command])
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert out.count("Report:") == 1
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert two["tasks"] == one["tasks"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for kind, count in (("answers", 4), ("figures", 2)):
        for rank in (0, 1):
            rows = (tmp_path / "two" / "parts" / f"{kind}-{rank}.jsonl").read_text()
            assert len(rows.splitlines()) == count
    assert run(where, tmp_path / "two", *more, full=True) == 0  # one process takes over
    assert result(tmp_path / "two")["tasks"] == one["tasks"]


DIES = """
import os, signal, sys
from groundkern.trainer.program import main
from groundkern.trainer.evaluation.rows import Rows
Rows.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_process_that_dies_leaves_the_others_a_sentence(where, tmp_path):
    """Without torchrun, which would end the others itself; killed when it has its first answers."""
    port = str(29500 + os.getpid() % 1000)
    ranks = [
        start([sys.executable, *how, *words(where, tmp_path)], **ALONE, MASTER_PORT=port, RANK=rank)
        for rank, how in (("0", ("-m", "groundkern")), ("1", ("-c", DIES)))
    ]
    _, err = ranks[0].communicate(timeout=200)
    ranks[1].communicate(timeout=200)
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 1
    assert "process 0 of 2: another process ended before the end of the answers" in err
    assert run(where, tmp_path) == 0
    assert len(predictions(tmp_path)) == 8


def test_other_commands_stay_with_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo", "--output", "nowhere"]) == 2
    assert "groundkern demo does not run under torchrun" in capsys.readouterr().err


def test_no_batch_is_taken_twice():
    batches = list(range(11))
    shares = [Ranks(rank, 3).share(batches) for rank in range(3)]
    assert sorted(one for share in shares for one in share) == batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
