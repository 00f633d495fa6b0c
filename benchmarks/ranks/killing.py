"""One run of `groundkern train` whose rank is killed, and the runs that continue it."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.ranks.launching import launcher, marked, started, told
from benchmarks.ranks.table import relative
from benchmarks.red_squares import red_square
from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder

GLOBAL_BATCH, STEPS, SAMPLES = 4, 4, 16  # samples to a step, whatever the ranks
PATIENCE = 180  # seconds for what should end at once
LIMIT = 400  # seconds for a whole run
NOBODY = "nobody"


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        status: of the launcher; None: it had to be ended.
        seconds: from the death of a rank until no process was left; None: nobody died.
        said: the last lines that name an error.
    """

    status: int | None
    seconds: float | None
    said: str


def make_data(where: Path) -> None:
    """Training samples, a tiny model and its processor.

    Args:
        where: a new folder.
    """
    where.mkdir(parents=True)
    word = {"text": "single", "box": [0, 0, 27, 27]}
    lines = []
    for number in range(SAMPLES):
        drawn = red_square(where, number, 4, ending=" of the grid" * (number % 3))
        lines.append(json.dumps({**drawn, "words": [word]}) + "\n")
    (where / "train.jsonl").write_text("".join(lines))
    tiny_qwen_model().save_pretrained(where / "model")
    tiny_qwen_processor().save_pretrained(where / "model")


def words_of(data: Path, output: Path, ranks: int, more: tuple[str, ...]) -> list[str]:
    """`groundkern train ...` with GLOBAL_BATCH samples to a step on so many ranks.

    Args:
        data: of `make_data`.
        output: the run's folder.
        ranks: processes.
        more: further settings.
    """
    settings = {
        "model.path": data / "model",
        "data.train": data / "train.jsonl",
        "objectives.smam": "{}",
        "objectives.dv_sft": "{}",
        "objectives.klal": "{}",
        "training.output": output,
        "training.steps": STEPS,
        "training.batch_size": 1,
        "training.accumulation": GLOBAL_BATCH // ranks,
        "training.learning_rate": 1e-3,
        "training.save_every": 1,
        "training.keep": STEPS + 1,
        "training.log_every": 1,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["groundkern", "train", *flags, *more]


def trained(
    strategy: str | None,
    ranks: int,
    data: Path,
    output: Path,
    *,
    more: tuple[str, ...] = (),
    victim: str = NOBODY,
    moment: str = "start",
) -> Ended:
    """Run it to its end, or until a rank is killed and all others are gone.

    Args:
        strategy: ddp, fsdp2, zero3; None for one process.
        ranks: processes.
        data, output: folders.
        more: further settings.
        victim: the rank that is killed; NOBODY: none.
        moment: of `dying.MOMENTS`.

    Returns:
        How it ended. What was printed is beside `output`, as `.log`.
    """
    death, log = output.with_suffix(".death"), output.with_suffix(".log")
    words = [*launcher(strategy, ranks), "benchmarks.ranks.dying", victim, moment, str(death)]
    words += words_of(data, output, ranks, more)
    begun = time.monotonic()
    with started(words, output, log) as process:
        while process.poll() is None or marked(output):
            late = death.exists() and time.time() - death.stat().st_mtime > PATIENCE
            if late or time.monotonic() - begun > LIMIT:
                return Ended(None, None, f"still there: {len(marked(output))} processes")
            time.sleep(0.05)
        seconds = time.time() - death.stat().st_mtime if death.exists() else None
        said = told(log) if process.wait() else ""
        return Ended(process.returncode, seconds, said)


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint that agrees with its record.

    Args:
        output: a run's folder.
    """
    return next((x for x in reversed(checkpoints.listed(output)) if not checkpoints.fault(x)), None)


def continued(
    strategy: str, ranks: int, before: int, data: Path, killed: Path
) -> tuple[Ended, Path]:
    """Continue a copy of a killed run.

    Args:
        strategy: of the killed run; one process has none.
        ranks: to continue on.
        before: ranks of the killed run; on as many it continues by itself, else it is told whence.
        data, killed: folders.

    Returns:
        How it ended, and its folder.
    """
    output = killed.with_name(f"{killed.name}-on-{ranks}")
    shutil.copytree(killed, output)
    newest = newest_whole(output)
    told_whence = ranks != before and newest is not None
    more = ("--training.resume", str(newest)) if told_whence else ()
    strategy = None if ranks == 1 and strategy == "ddp" else strategy
    return trained(strategy, ranks, data, output, more=more), output


def judged(output: Path, whole: Path, *, exactly: bool) -> tuple[str, float]:
    """What a continued run left, beside the run that nobody interrupted.

    Args:
        output, whole: the folders of both.
        exactly: losses and weights have to have the same bits.

    Returns:
        "whole" or what is wrong; and the largest relative difference of a figure or a weight.
    """
    rows, wanted = (folder.read_metrics(x) for x in (output, whole))
    if [row["step"] for row in rows] != [row["step"] for row in wanted]:
        return f"metrics of steps {[row['step'] for row in rows]}", math.nan
    record = output / folder.RECORD
    if not record.exists() or durable.read_json(record)["steps"] != STEPS:
        return "no whole record", math.nan
    faults = [reason for x in checkpoints.listed(output) if (reason := checkpoints.fault(x))]
    if faults:
        return faults[0], math.nan
    terms = folder.loss_terms(wanted)
    apart = [relative(x, y) for x, y in zip(_by_term(rows, terms), _by_term(wanted, terms))]
    weights, theirs = (load_file(x / folder.MODEL / "model.safetensors") for x in (output, whole))
    apart += [relative(weights[name], x) for name, x in theirs.items()]
    if exactly and not all(torch.equal(weights[name], x) for name, x in theirs.items()):
        return "weights of other bits", max(apart)
    return "whole", max(apart)


def _by_term(rows: list[dict], names: list[str]) -> torch.Tensor:
    """The logged losses of all steps, [terms, steps]."""
    return torch.tensor([[row[name] for row in rows] for name in names], dtype=torch.float64)
