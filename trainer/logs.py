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
from groundkern.hf.watching.plain import finite_or_none
from trainer import checkpoints, durable
from trainer.config import Config
from trainer.data.bad_samples import BadSamples
from trainer.data.collating import COUNTS, RobustCollator
from trainer.progress import progress
from trainer.run_folder import METRICS, loss_terms
from trainer.watching import best_step, steps_there


class CountingTrainer(GroundingTrainer):
    """`GroundingTrainer` that counts what it trains on and whose checkpoints are whole or absent.

    Args:
        config: the run's settings.
        train_digest: sha256 of the training file.
        counts: what the counts of batches are added to.
        bad: the list that samples left out of a batch are added to.
        held_out: the collator of evaluations while training; None: there are none.
    """

    def __init__(
        self,
        *args: Any,
        config: Config,
        train_digest: str,
        counts: Counter,
        bad: BadSamples,
        held_out: RobustCollator | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self.config, self.train_digest = config, train_digest
        self.counts, self.bad = counts, bad
        self._saving: Path | None = None

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = dict(inputs)
        counts = inputs.pop(COUNTS)
        if self.model.training:  # not what is held out
            self.counts.update(counts["supervision"])
            self.bad.add_all(counts["bad"])
        elif self.held_out is not None:
            self.held_out.bad.add_all(counts["bad"])
        return super()._prepare_inputs(inputs)

    def get_eval_dataloader(self, eval_dataset=None):
        own, self.data_collator = self.data_collator, self.held_out or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own

    def _write_checkpoint(self, model, trial) -> None:
        """Save aside; older ones go first, down to `keep`: the newest of them has proved good.

        What a step made of the weights shows in the next one, so a run never holds just the
        checkpoint that it wrote last.
        """
        output, name = self.config.training.output, f"checkpoint-{self.state.global_step}"
        best = best_step(self.state, self.config.evaluation, steps_there(output))
        checkpoints.rotate(output, self.config.training.keep, best=best)
        with checkpoints.aside(output, name) as folder:
            self._saving = folder.parent
            try:
                super()._write_checkpoint(model, trial)
            finally:
                self._saving = None
            checkpoints.seal(
                folder, self.config, train_digest=self.train_digest, counts=self.counts
            )
            durable.sync_file(output / METRICS)  # its rows up to here belong to the checkpoint

    def _get_output_dir(self, trial) -> str:
        return str(self._saving or super()._get_output_dir(trial))


class RunLog(TrainerCallback):
    """Progress bar, log lines and metrics.jsonl.

    Args:
        config: the run's settings.
        counts: of the batches trained on so far.
    """

    def __init__(self, config: Config, counts: Counter):
        self.config, self._counts, self._counted = config, counts, Counter(counts)
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
        if "loss" not in logs:  # the summary at the end of training
            return
        steps, seconds = state.global_step - self._logged, time.monotonic() - self._since
        timed = state.global_step - max(self._logged, self._began)
        samples = timed * args.train_batch_size * args.gradient_accumulation_steps
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
