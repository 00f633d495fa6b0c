"""What a run tells while it trains: a progress bar with a rate, log lines, metrics.jsonl, and counts."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from groundkern.hf import GroundedExample, GroundingTrainer
from trainer.config import Config
from trainer.run_folder import METRICS, write_checkpoint_record

_NOT_LOSSES = ("step", "steps", "epoch", "grad_norm", "learning_rate", "samples_per_second")


def loss_terms(rows: list[dict]) -> list[str]:
    """The logged losses, total first, in the order they appear."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_LOSSES)
    return sorted(names, key=lambda name: name != "loss")


class CountingCollator:
    """A collator whose batches say what supervision they lost and which labels they hold.

    The counts travel with the batch, so they are right with worker processes and prefetching, and only batches that
    were trained on count.
    """

    KEY = "counts"

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, examples: list[GroundedExample]) -> dict:
        before = Counter(self.collator.counts)
        batch = dict(self.collator(examples))
        labels = batch["gk_word_label"][batch["gk_word_position"] >= 0].tolist()
        lost = {k: n - before[k] for k, n in self.collator.counts.items() if n != before[k]}
        batch[self.KEY] = {"lost": lost, "labels": Counter(labels)}
        return batch


class CountingTrainer(GroundingTrainer):
    """`GroundingTrainer` that adds up the counts of the batches it trains on."""

    def __init__(self, *args: Any, lost: Counter, labels: Counter, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lost, self.labels = lost, labels

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        counts = inputs.pop(CountingCollator.KEY)
        self.lost.update(counts["lost"])
        self.labels.update(counts["labels"])
        return super()._prepare_inputs(inputs)


class RunLog(TrainerCallback):
    """Progress bar, log lines, metrics.jsonl, and the record that completes a checkpoint."""

    def __init__(self, config: Config, lost: Counter, labels: Counter):
        self.config, self.lost, self.labels = config, lost, labels
        self.saved = ""
        self._bar: tqdm | None = None
        self._logged, self._since = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        start = state.global_step
        self._bar = tqdm(total=state.max_steps, initial=start, desc="training", unit="step")
        self._logged, self._since = start, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

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
        write_checkpoint_record(checkpoint, self.config, self.lost, self.labels)
        self.saved = str(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
