"""Runs of two processes, one after another in one launch, since starting costs more than they do:

python -m tests.hf.forked tests.trainer.ranks_run DATA FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from groundkern.trainer import checkpoints
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.last_step import LastStep
from groundkern.trainer.ranks import Ranks, joined
from groundkern.trainer.stopping import Stopped
from groundkern.trainer.train import train_by
from tests.trainer.tiny_run import config

SAVED, STOPPED_AT = 2, 3


def settings(data: Path, output: Path, *, processes: int, **training) -> Config:
    """A run of four steps whose steps take eight samples with one process and with two."""
    given = {"batch_size": 4 // processes, "steps": 4, "save_every": 2, "keep": 4}
    evaluation = {"batch_size": 1, "every": 2, "best": "loss", "heatmaps": 1}
    return config(data, output, training={**given, **training}, evaluation=evaluation)


def half(output: Path, source: Path) -> None:
    """A copy of a run as it was when it had saved its first checkpoint."""
    shutil.copytree(source, output)
    for path in checkpoints.listed(output)[1:]:
        shutil.rmtree(path)


def stopped(ranks: Ranks, given: Config, at: int = STOPPED_AT) -> dict:
    """A run of which the second process alone gets SIGTERM, at a step."""
    ends = LastStep.on_step_end

    def signalled(self, args, state, control, **kwargs):
        if state.global_step == at and not ranks.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return ends(self, args, state, control, **kwargs)

    LastStep.on_step_end = signalled
    try:
        train_by(ranks, given)
    except Stopped as stop:
        return {"number": stop.number, "saved": Path(stop.saved).name, "agreed": stop.agreed}
    finally:
        LastStep.on_step_end = ends
    return {}


def refused(ranks: Ranks, given: Config) -> str:
    """Why a run is refused, which the first process alone finds out."""
    try:
        train_by(ranks, given)
    except ConfigError as error:
        return str(error)
    return ""


def main(data: Path, folder: Path) -> None:
    """All runs; what each process saw of them is in `FOLDER/RANK.json`."""
    with joined() as ranks:
        whole, resumed = folder / "whole", folder / "resumed"
        train_by(ranks, settings(data, whole, processes=2))
        ranks.alone(lambda: half(resumed, whole), "the copy")
        train_by(ranks, settings(data, resumed, processes=2))
        found = {
            "stopped": stopped(ranks, settings(data, folder / "stopped", processes=2)),
            "refused": refused(ranks, settings(data, whole, processes=2, resume="never")),
        }
        shared, divided = folder / "shared", folder / "divided"
        train_by(ranks, settings(data, shared, processes=1, context_parallel=2))
        ranks.alone(lambda: half(divided, shared), "the copy")
        train_by(ranks, settings(data, divided, processes=2))
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
