"""The Trainer of a run: the samples that it takes, what they counted, and whole checkpoints."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from groundkern.hf import GroundingTrainer
from groundkern.trainer import checkpoints, durable
from groundkern.trainer.collating import COUNTS, RobustCollator
from groundkern.trainer.config import Config
from groundkern.trainer.data.bad_samples import BadSample, BadSamples
from groundkern.trainer.data.epochs import EpochSampler
from groundkern.trainer.data.order import Course, Order
from groundkern.trainer.ranks import Ranks
from groundkern.trainer.run_folder import METRICS
from groundkern.trainer.streaming import position
from groundkern.trainer.streaming.batches import stream_batches
from groundkern.trainer.streaming.stream import SampleStream
from groundkern.trainer.watching import best_step, steps_there


class CountingTrainer(GroundingTrainer):
    """`GroundingTrainer` that counts what it trains on and whose checkpoints are whole or absent.

    Args:
        config: the run's settings.
        train_digest: sha256 of the training files.
        counts: what the counts of batches are added to, those of all processes.
        bad: the list that samples left out of a batch are added to.
        held_out: the collator of evaluations while training; None: there are none.
        order: of the samples of an epoch; None: transformers' own.
        stream_from: where a checkpoint was in a stream of training samples; None: the beginning.
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
        order: EpochSampler | None = None,
        stream_from: dict[str, Any] | None = None,
        course: Course,
        last: int | None = None,
        ranks: Ranks | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self.config, self.train_digest = config, train_digest
        self.counts, self.bad = counts, bad
        self.order = order
        self.course, self.last, self.processes = course, last, ranks or Ranks()
        self._late: list[BadSample] = []  # of batches since the processes met last
        self._seen: Counter = Counter()
        self._read = 0  # records of a stream
        self._saving: Path | None = None
        self._position: position.Position | None = None
        if isinstance(self.train_dataset, SampleStream):
            stream, args = self.train_dataset, self.args
            stream.rank = self.context.of_rank(args.process_index)
            stream.ranks = args.world_size // self.context.size
            stream.workers = args.dataloader_num_workers
            self._position = position.Position(stream)
            self._position.restore(stream_from)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        counts = inputs.pop(COUNTS)
        if self.model.training:  # not what is held out
            self._seen.update(counts["supervision"])
            self._late += counts["bad"]
            if self._position is not None:
                self._position.note(counts["reader"])
                self._read += counts["read"]
            if self.processes.size == 1:
                self.exchange()
        elif self.held_out is not None:
            self.held_out.bad.add_all(counts["bad"])
        return super()._prepare_inputs(inputs)

    def get_train_dataloader(self):
        self._train_batch_size = self.args.train_batch_size  # not a checkpoint's
        if self._position is not None:
            loader = stream_batches(self.train_dataset, self.data_collator, self.args)
        else:
            loader = super().get_train_dataloader()
        if self._position is None and (self.processes.size > 1 or self.course.moved):
            order = self.order or loader.get_sampler()
            loader.set_sampler(Order(order, self.course, self.last))
        if self.processes.size > 1:
            _in_own_groups(loader)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        return self.order or super()._get_train_sampler(train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer does, with the epoch by the samples that were taken.

        Args:
            logs, start_time: as in transformers' Trainer.
        """
        if self._position is not None:  # a stream has no epochs, and the Trainer begins anew
            self.state.epoch = self.state.global_step / self.state.max_steps
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
        read, self._read = self._read, 0
        found = self.processes.gathered((seen, late, read), "the end of a step")
        for counts, bad, records in self.processes.of_readers(found):
            self.counts.update(counts)
            self.bad.total += records
            self.bad.add_all(bad)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer does; the samples that were left out are then known to every process."""
        figures = super().evaluate(*args, **kwargs)
        if self.held_out is not None:
            same_bad_samples(self.held_out.bad, self.processes)
        return figures

    def get_eval_dataloader(self, eval_dataset=None):
        own, self.data_collator = self.data_collator, self.held_out or self.data_collator
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own
        if self.processes.size > 1:
            _in_own_groups(loader)
        return loader

    def _write_checkpoint(self, model, trial) -> None:
        """Save aside; older ones go first, down to `keep`: the newest of them has proved good.

        What a step made of the weights shows in the next one, so a run never holds just the
        checkpoint that it wrote last.
        """
        output, name = self.config.training.output, f"checkpoint-{self.state.global_step}"
        self.exchange()
        if self.processes.first:
            best = best_step(self.state, self.config.evaluation, steps_there(output))
            checkpoints.rotate(output, self.config.training.keep, best=best)
        with checkpoints.aside(output, name, self.processes) as folder:
            self._saving = folder.parent
            try:
                super()._write_checkpoint(model, trial)
            finally:
                self._saving = None
            self._keep_position(folder)
            checkpoints.written_by_all(folder, self.processes)
            if self.processes.first:
                position = {
                    "samples": self.course.samples,
                    "taken": self.course.at(self.state.global_step),
                    "processes": self.processes.readers,
                }
                checkpoints.seal(
                    folder,
                    self.config,
                    train_digest=self.train_digest,
                    counts=self.counts,
                    position=position,
                )
                durable.sync_file(output / METRICS)  # its rows up to here belong to the checkpoint

    def _keep_position(self, folder: Path) -> None:
        """Writes where the readers of all processes are in a stream."""
        if self._position is not None:
            parts = self.processes.gathered(self._position.saved(), "the places in the stream")
            if self.processes.first:
                merged = position.merged(self.processes.of_readers(parts))
                durable.write_json(folder / position.FILE, merged)

    def _get_output_dir(self, trial) -> str:
        return str(self._saving or super()._get_output_dir(trial))


def _in_own_groups(loader: DataLoader) -> None:
    """Lets the workers of a loader begin process groups: torchrun signals whole groups."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's passes on what it is asked
    inner.worker_init_fn = partial(_own_group, inner.worker_init_fn)


def _own_group(then: Callable[[int], None] | None, worker: int) -> None:
    """Begins a worker process, whose end the process that has it decides about."""
    if hasattr(os, "setpgid"):
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
