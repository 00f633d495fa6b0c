"""What a run reports while it trains: progress bar, log lines and metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections import Counter

from tqdm import tqdm
from transformers import TrainerCallback

from groundkern.hf.watching.plain import finite_or_none
from groundkern.trainer import durable
from groundkern.trainer.config import Config
from groundkern.trainer.controls import control_of
from groundkern.trainer.progress import progress
from groundkern.trainer.run_folder import METRICS, loss_terms


class RunLog(TrainerCallback):
    """Progress bar, log lines and metrics.jsonl.

    Args:
        config: of the run.
        counts: of the batches trained on so far, of all processes.
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
        control = control_of(self.config.objectives)
        if control is not None and self.writes:
            self._bar.write(f"This run is a control: {control}.")
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
        samples *= args.world_size // self.config.training.context_parallel
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
