"""What a run reports while it trains: progress bar, log lines, metrics.jsonl and counts."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from groundkern.hf import GroundingTrainer
from groundkern.hf.watching.plain import finite_or_none
from trainer import checkpoints, durable
from trainer.config import Config
from trainer.data.bad_samples import BadSample, BadSamples
from trainer.data.collating import COUNTS, RobustCollator
from trainer.data.order import Course, Order
from trainer.progress import progress
from trainer.ranks import Ranks
from trainer.run_folder import METRICS, loss_terms
from trainer.watching import best_step, steps_there


class CountingTrainer(GroundingTrainer):
    """`GroundingTrainer` that counts what it trains on and whose checkpoints are whole or absent.

    Args:
        config: the run's settings.
        train_digest: sha256 of the training file.
        counts: what the counts of batches are added to, those of all processes.
        bad: the list that samples left out of a batch are added to.
        held_out: the collator of evaluations while training; None: there are none.
        course: how the steps go through the data.
        last: samples after which there are only fillers; None: never.
        ranks: the processes of the run; None: this one.
    """

    def __init__(
        self,
        *args: Any,
        config: Config,
        train_digest: str,
        counts: Counter,
        bad: BadSamples,
        held_out: RobustCollator | None = None,
        course: Course,
        last: int | None = None,
        ranks: Ranks | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self.config, self.train_digest = config, train_digest
        self.counts, self.bad = counts, bad
        self.course, self.last, self.ranks = course, last, ranks or Ranks()
        self._late: list[BadSample] = []  # of batches since the processes met last
        self._seen: Counter = Counter()
        self._saving: Path | None = None

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        counts = inputs.pop(COUNTS)
        if self.model.training:  # not what is held out
            self._seen.update(counts["supervision"])
            self._late += counts["bad"]
            if self.ranks.size == 1:
                self.exchange()
        elif self.held_out is not None:
            self.held_out.bad.add_all(counts["bad"])
        return super()._prepare_inputs(inputs)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.ranks.size > 1 or self.course.moved:
            loader.set_sampler(Order(loader.get_sampler(), self.course, self.last))
        if self.ranks.size > 1:
            loader.worker_init_fn = partial(_own_group, loader.worker_init_fn)
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer does, with the epoch by the samples that were taken.

        Args:
            logs, start_time: as in transformers' Trainer.
        """
        if self.course.moved:
            self.state.epoch = self.course.at(self.state.global_step) / self.course.samples
        super().log(logs, start_time)

    def has_news(self) -> bool:
        """Whether this process left out samples that the others do not know of."""
        return bool(self._late)

    def exchange(self) -> None:
        """Adds what the batches of all processes had to `counts` and `bad` of each.

        Raises:
            SampleError: too many bad samples, in all of the processes alike.
        """
        seen, self._seen, late, self._late = self._seen, Counter(), self._late, []
        for counts, bad in self.ranks.gathered((seen, late), "the end of a step"):
            self.counts.update(counts)
            self.bad.add_all(bad)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer does; the samples that were left out are then known to every process."""
        figures = super().evaluate(*args, **kwargs)
        if self.held_out is not None:
            same_bad_samples(self.held_out.bad, self.ranks)
        return figures

    def get_eval_dataloader(self, eval_dataset=None):
        own, self.data_collator = self.data_collator, self.held_out or self.data_collator
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own
        if self.ranks.size > 1:
            loader.worker_init_fn = partial(_own_group, loader.worker_init_fn)
        return loader

    def _write_checkpoint(self, model, trial) -> None:
        """Save aside; older ones go first, down to `keep`: the newest of them has proved good.

        What a step made of the weights shows in the next one, so a run never holds just the
        checkpoint that it wrote last.
        """
        output, name = self.config.training.output, f"checkpoint-{self.state.global_step}"
        self.exchange()
        if self.ranks.first:
            best = best_step(self.state, self.config.evaluation, steps_there(output))
            checkpoints.rotate(output, self.config.training.keep, best=best)
        with checkpoints.aside(output, name, self.ranks) as folder:
            self._saving = folder.parent
            try:
                super()._write_checkpoint(model, trial)
            finally:
                self._saving = None
            checkpoints.written_by_all(folder, self.ranks)
            if self.ranks.first:
                taken = self.course.at(self.state.global_step)
                checkpoints.seal(
                    folder,
                    self.config,
                    train_digest=self.train_digest,
                    counts=self.counts,
                    position={"samples": self.course.samples, "taken": taken},
                )
                durable.sync_file(output / METRICS)  # its rows up to here belong to the checkpoint

    def _get_output_dir(self, trial) -> str:
        return str(self._saving or super()._get_output_dir(trial))


def _own_group(then: Callable[[int], None] | None, worker: int) -> None:
    """Begins a worker process, whose end the process that has it decides about."""
    if hasattr(os, "setpgid"):  # torchrun signals groups of processes
        os.setpgid(0, 0)
    if then is not None:
        then(worker)


def same_bad_samples(bad: BadSamples, ranks: Ranks) -> None:
    """Makes the bad samples that any process found known to all of them.

    Args:
        bad: those of this process.
        ranks: the processes.

    Raises:
        SampleError: these are too many.
    """
    for found in ranks.gathered(list(bad), "the samples that were left out"):
        bad.add_all(found)


class RunLog(TrainerCallback):
    """Progress bar, log lines and metrics.jsonl.

    Args:
        config: of the run.
        counts: of the batches trained on so far.
        writes: false in all processes of the run but the first.
    """

    def __init__(self, config: Config, counts: Counter, *, writes: bool = True):
        self.config, self.writes = config, writes
        self._counts, self._counted = counts, Counter(counts)
        self._bar: tqdm | None = None
        self._logged, self._began, self._since = 0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        start = state.global_step
        state.compute_steps(args, state.max_steps)  # a checkpoint's are those of its own settings
        self._bar = progress("training", total=state.max_steps, unit="step", done=start)
        logged = [row["step"] for row in state.log_history if "loss" in row]
        self._logged = max(logged, default=0)  # a checkpoint's: its open line goes on
        self._began, self._since = start, time.monotonic()
        self._counted = Counter(self._counts)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self.writes:  # the former: the summary at the end of training
            return
        steps, seconds = state.global_step - self._logged, time.monotonic() - self._since
        timed = state.global_step - max(self._logged, self._began)
        samples = timed * args.train_batch_size * args.gradient_accumulation_steps
        samples *= args.world_size
        row = {"step": state.global_step, "steps": steps, **logs}
        row["samples_per_second"] = round(samples / max(seconds, 1e-9), 2)
        row |= self._tokens(seconds)
        durable.append_line(self.config.training.output / METRICS, json.dumps(finite_or_none(row)))
        losses = "  ".join(f"{name} {row[name]:.4g}" for name in loss_terms([row]))
        rates = f"{row['samples_per_second']:.3g} samples/s  {row['tokens_per_second']:,} tokens/s"
        padding = f"{row['padding']:.0%}"
        if self.config.data.pack_to is not None:
            padding = f"{row['padding_unpacked']:.0%} -> {padding}"
        self._bar.write(
            f"step {row['step']}  {losses}  lr {row['learning_rate']:.3g}  {rates}  "
            f"padding {padding.replace('%', ' %')}"
        )
        self._logged, self._since = state.global_step, time.monotonic()
        self._counted = Counter(self._counts)

    def _tokens(self, seconds: float) -> dict[str, float]:
        """Real tokens a second since the last line, and the share of padding: as it was, and with
        each sample in a row of its own."""
        real, laid, alone = (
            self._counts[name] - self._counted[name]
            for name in ("tokens", "tokens_laid", "tokens_padded")
        )
        return {
            "tokens_per_second": round(real / max(seconds, 1e-9)),
            "padding": round(1 - real / laid, 4) if laid else 0.0,
            "padding_unpacked": round(1 - real / alone, 4) if alone else 0.0,
        }

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._since += metrics.get("eval_runtime", 0.0)  # samples_per_second is of training

    def close(self) -> None:
        """Ends the bar, however training ended."""
        if self._bar is not None:
            self._bar.close()
