"""Evaluation while a run trains: held-out rows, the best checkpoint, early stopping, trackers.

Which checkpoint is the best, and whether patience is over, follow from the log history in the
Trainer's state alone, so that a run that was killed and continued decides as if nothing happened.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from groundkern.hf.watching.held_out import ACCURACIES
from groundkern.hf.watching.plain import finite_or_none
from groundkern.trainer import checkpoints, durable
from groundkern.trainer.config import Config, ConfigError, Evaluation
from groundkern.trainer.metrics.held_out import pick
from groundkern.trainer.ranks import Ranks
from groundkern.trainer.run_folder import METRICS

logger = logging.getLogger(__name__)

PREFIX = "eval_"
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def held_out_set(tasks: list[str], data: Dataset, config: Config) -> Subset | None:
    """The samples that training is evaluated on: those of the evaluations before and after.

    Args:
        tasks: of each sample of `data`.
        data: the held-out samples.
        config: of the run.
    """
    if config.evaluation.every is None:
        return None
    picked = pick(tasks, config.evaluation.samples)
    return Subset(data, sorted(index for indices in picked.values() for index in indices))


def evaluations(state: TrainerState, best: str) -> dict[int, float]:
    """A held-out figure by step, so far; NaN where it was not finite.

    Args:
        state: of the Trainer.
        best: a name of `evaluation.best`.
    """
    found = {}
    for row in state.log_history:
        if PREFIX + best in row:
            value = row[PREFIX + best]
            found[row["step"]] = math.nan if value is None else value
    return found


def best_step(
    state: TrainerState, settings: Evaluation, among: Iterable[int] | None = None
) -> int | None:
    """The step of the best checkpoint, which is never rotated away.

    Args:
        state: of the Trainer.
        settings: of the run.
        among: the steps of the checkpoints that are there; None: any.

    Returns:
        The first step with the best finite figure; None if none is known or asked for.
    """
    if settings.best is None:
        return None
    allowed = None if among is None else set(among)
    best = None
    for step, value in sorted(evaluations(state, settings.best).items()):
        if math.isfinite(value) and (allowed is None or step in allowed):
            value = -value if settings.best in ACCURACIES else value
            if best is None or value < best[0]:
                best = value, step
    return None if best is None else best[1]


def out_of_patience(state: TrainerState, settings: Evaluation) -> bool:
    """Whether so many evaluations in a row as `evaluation.patience` says found nothing better.

    Args:
        state: of the Trainer.
        settings: of the run.
    """
    if settings.patience is None:
        return False
    best = best_step(state, settings) or 0
    waited = [step for step in evaluations(state, settings.best) if step > best]
    return len(waited) >= settings.patience


class Watching(TrainerCallback):
    """Writes held-out rows, asks for a checkpoint of the best step, stops when patience is over.

    Args:
        config: of the run.
        ranks: the processes of the run, which all decide alike; None: this one.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()

    def on_step_end(self, args, state, control, **kwargs):
        if self.config.evaluation.every is not None and state.global_step >= state.max_steps:
            control.should_evaluate = True  # what the run ends with is compared too
        return control

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        settings = self.config.evaluation
        held_out = {name: x for name, x in metrics.items() if name.startswith(PREFIX)}
        for name in TIMES:
            held_out.pop(PREFIX + name, None)
        row = {"step": state.global_step, **held_out}
        output = self.config.training.output
        if self.ranks.first:
            durable.append_line(output / METRICS, json.dumps(finite_or_none(row)))
        figures = "  ".join(f"{name.removeprefix(PREFIX)} {x:.4g}" for name, x in held_out.items())
        tqdm.write(f"step {state.global_step} held out  {figures}")
        if settings.best is None:
            return control
        if PREFIX + settings.best not in held_out:
            known = ", ".join(name.removeprefix(PREFIX) for name in held_out)
            raise ConfigError(
                f"`evaluation.best`: expected a figure of {self.config.data.test} ({known}), "
                f"got {settings.best}, which has no row there"
            )
        there = self.ranks.alone(lambda: set(steps_there(output)), "the list of checkpoints")
        there |= {state.global_step}
        if best_step(state, settings, there) == state.global_step:
            control.should_save = True
        if out_of_patience(state, settings):
            tqdm.write(f"Stopping: no better {settings.best} in {settings.patience} evaluations.")
            control.should_save = control.should_training_stop = True
        return control


def refuse_trackers(names: list[str]) -> None:
    """Refuse a tracker that is unknown, or whose package is not installed, before any work.

    Args:
        names: of `training.report_to`.

    Raises:
        ConfigError: with its name and what it needs.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"`training.report_to`: expected some of {known}, got {name}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"`training.report_to`: {name} cannot be used: {reason}") from None


def refuse_fp16(config: Config) -> None:
    """Refuse `training.fp16` where accelerate has no scaled float16.

    Raises:
        ConfigError: there is no GPU.
    """
    if config.training.fp16 and not torch.accelerator.is_available():
        raise ConfigError("`training.fp16`: expected a GPU, got none; bf16 runs on a CPU too")


def autocast_type(config: Config) -> torch.dtype | None:
    """The dtype that evaluations run in, as training does; None: the weights' own."""
    if config.training.bf16:
        return torch.bfloat16
    return torch.float16 if config.training.fp16 else None


def finished(checkpoint: Path, config: Config, max_steps: int) -> bool:
    """Whether a run ends at a checkpoint: all steps are taken, or patience is over.

    Args:
        checkpoint: its folder.
        config: of the run.
        max_steps: of the run.
    """
    state = load_state(checkpoint)
    return state.global_step >= max_steps or out_of_patience(state, config.evaluation)


def load_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Args:
        checkpoint: its folder.
    """
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def steps_there(output: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, whole or not.

    Args:
        output: the run's folder.
    """
    return {int(path.name.rpartition("-")[2]): path for path in checkpoints.listed(output)}


def best_of(output: Path, settings: Evaluation) -> dict[str, Any] | None:
    """The best of a run's checkpoints that are whole.

    Args:
        output: the run's folder, whose newest checkpoint is its own.
        settings: of the run.

    Returns:
        Its step, metric, value and folder; None if there is none or none was asked for.
    """
    there = steps_there(output)
    if settings.best is None or not there:
        return None
    state = load_state(there[max(there)])
    while (step := best_step(state, settings, there)) is not None:
        path = there.pop(step)
        if (reason := checkpoints.fault(path)) is None:
            value = evaluations(state, settings.best)[step]
            return {"step": step, "metric": settings.best, "value": value, "checkpoint": str(path)}
        logger.warning("%s, the best one, is damaged and is passed over: %s", path, reason)
    return None
