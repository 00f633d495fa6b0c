"""What a run reports while it trains: progress bar, log lines, metrics.jsonl and counts."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from groundkern.hf import GroundingTrainer
from trainer.collating import COUNTS
from trainer.config import Config
from trainer.dataset import BadSample
from trainer.progress import progress
from trainer.run_folder import METRICS, loss_terms, write_checkpoint_record


class CountingTrainer(GroundingTrainer):
    """`GroundingTrainer` that adds up the counts of the batches it trains on.

    Args:
        counts: what it adds to.
        bad: the list that samples left out of a batch are added to.
    """

    def __init__(self, *args: Any, counts: Counter, bad: list[BadSample], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counts, self.bad = counts, bad

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        counts = inputs.pop(COUNTS)
        self.counts.update(counts["supervision"])
        self.bad.extend(bad for bad in counts["bad"] if bad not in self.bad)
        return super()._prepare_inputs(inputs)


class RunLog(TrainerCallback):
    """Progress bar, log lines, metrics.jsonl, and the record that completes a checkpoint."""

    def __init__(self, config: Config, counts: Counter):
        self.config, self.counts = config, counts
        self._bar: tqdm | None = None
        self._logged, self._since = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        start = state.global_step
        self._bar = progress("training", total=state.max_steps, unit="step", done=start)
        self._logged, self._since = start, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # the summary at the end of training
            return
        steps, seconds = state.global_step - self._logged, time.monotonic() - self._since
        samples = steps * args.train_batch_size * args.gradient_accumulation_steps
        row = {"step": state.global_step, "steps": steps, **logs}
        row["samples_per_second"] = round(samples / max(seconds, 1e-9), 2)
        with (self.config.training.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        losses = "  ".join(f"{name} {row[name]:.4g}" for name in loss_terms([row]))
        rate = f"{row['samples_per_second']:.3g} samples/s"
        self._bar.write(f"step {row['step']}  {losses}  lr {row['learning_rate']:.3g}  {rate}")
        self._logged, self._since = state.global_step, time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_checkpoint_record(checkpoint, self.config, self.counts)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
