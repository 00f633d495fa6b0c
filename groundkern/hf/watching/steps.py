"""What happens around a step: parts summed for the log, finite or not, the terms' gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from groundkern.checks import fail, require
from groundkern.hf.watching.checkpoints import averaged_weights
from groundkern.hf.watching.finite import (
    FiniteSteps,
    Verdict,
    gradient_norm,
    skip_step,
    step_taken,
)
from groundkern.hf.watching.idle_terms import IdleTerms
from groundkern.hf.watching.plain import DivergedError, number
from groundkern.hf.watching.still_policy import StillPolicy
from groundkern.hf.watching.term_norms import summed_over_ranks, term_norms


class StepWatch(TrainerCallback):
    """The callback of `GroundingMixin`.

    Args:
        trainer: with the mixin.
        max_nonfinite: steps in a row that end the run.
        term_norms_every: steps between norms of the terms' gradients; None: never.

    Attributes:
        finite: counts the steps that were not finite.
        batches: the micro-batches of the step that is about to run.
        told: how many of the steps that were not finite have been logged.
    """

    def __init__(self, trainer: Any, max_nonfinite: int, term_norms_every: int | None) -> None:
        self.trainer: Any = trainer
        self.every: int | None = term_norms_every
        if term_norms_every is not None:
            require(term_norms_every > 0, "term_norms_every", "a number above 0", term_norms_every)
            self._refuse_norms()
        self.finite: FiniteSteps = FiniteSteps(max_nonfinite, trainer.args.device)
        self.batches: list[dict[str, Any]] = []
        self.told: int = 0
        self.norm: Tensor | float | None = None  # of the step's gradient, if the Trainer said
        self.resumed: dict[str, Any] = {}  # of the checkpoint that training starts from
        self._sums: dict[tuple[str, ...], Tensor] = {}  # of the parts since the last log line
        self._since = 0  # the step at which the sums began
        self._norms: dict[str, Tensor] = {}
        self._policy, self._idle = StillPolicy(), IdleTerms()

    def _refuse_norms(self) -> None:
        args = self.trainer.args
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            fail("term_norms_every", "None under FSDP and DeepSpeed", self.every)
        how = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and how.get("use_reentrant"):
            fail("gradient_checkpointing_kwargs", "use_reentrant=False for term_norms_every", how)

    def add(self, parts: dict[str, Tensor]) -> None:
        """Sums the parts of a micro-batch, and looks at them.

        Args:
            parts: fp32 scalars by name.
        """
        if not self._sums:
            self._since = self.trainer.state.global_step
        names = tuple(sorted(parts))
        values = torch.stack([parts[name] for name in names])
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self.finite.add(" ".join(names), values)

    def logged(self) -> dict[str, float]:
        """The mean of each part over the steps since the last log line, and the newest norms."""
        steps = max(1, self.trainer.state.global_step - self._since)
        means = {name: value / steps for name, value in self._whole_sums().items()}
        state = self.trainer.state
        self._policy.look(means, state.global_step)
        if state.is_world_process_zero:
            self._idle.look(means, state.global_step, state.max_steps)
        norms = {name: float(norm) for name, norm in self._norms.items()}
        self._sums, self._norms = {}, {}
        return {**means, **norms}

    def _whole_sums(self) -> dict[str, float]:
        """The sums over steps and ranks: one reduction, one copy from the device."""
        if not self._sums:
            return {}
        trainer = self.trainer
        values = torch.cat(list(self._sums.values()))
        if trainer.args.world_size > 1:  # a rank has its share of the global mean, or its own mean
            ranks = trainer.accelerator.gather(values[None])
            shares = trainer.args.average_tokens_across_devices
            values = ranks.sum(0) / trainer.context.size if shares else ranks.mean(0)
        total: dict[str, float] = {}
        names = [name for names in self._sums for name in names]
        for name, value in zip(names, values.tolist(), strict=True):
            total[name] = total.get(name, 0.0) + value
        return dict(sorted(total.items()))

    # ---- finite steps ----

    def verdict(self) -> Verdict:
        """What the steps so far came to; the same on every rank."""
        several = self.trainer.args.world_size > 1
        return self.finite.read(self.trainer.accelerator.gather if several else None)

    def stop_if_reached(self, verdict: Verdict) -> None:
        """Ends the run once enough steps in a row were not finite.

        Raises:
            DivergedError: they were.
        """
        if verdict.reached:
            why = "no checkpoint was written since; lower the learning rate, or look at the data"
            raise DivergedError(verdict.sentence(self.trainer.state.global_step, why))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._idle.done = state.global_step > 0
        self.restore(self.resumed)
        self.resumed = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches, self.batches = self.batches, []
        if not (self.every and batches and (state.global_step + 1) % self.every == 0):
            return
        trainer = self.trainer
        several = args.world_size > 1
        scaler = getattr(trainer.accelerator, "scaler", None)
        batches = [
            {k: x for k, x in trainer._prepare_input(batch).items() if not isinstance(x, dict)}
            for batch in batches  # without the counts that a collator may add
        ]
        self._norms = term_norms(
            trainer.model.train(),
            batches,
            gather=summed_over_ranks if several else None,
            scale=1.0 if scaler is None else scaler.get_scale(),
        )
        if several and not args.average_tokens_across_devices:
            means = args.world_size / trainer.context.size  # of so many
            self._norms = {name: norm / means for name, norm in self._norms.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.even_ranks.forget_unseen()
        norm, self.norm = self.norm, None
        if norm is None:
            norm = gradient_norm(trainer.model.parameters())
        norm = torch.as_tensor(norm, device=args.device)
        scaler = getattr(trainer.accelerator, "scaler", None)
        scale = None if scaler is None else scaler._scale
        scaled = scaler is not None or (trainer.is_deepspeed_enabled and args.fp16)
        if scaled and scale is None:  # a first scale, or DeepSpeed's own
            scale = norm.new_tensor(float("inf"))
        skip = self.finite.step(norm, state.global_step + 1, scale)
        if scaler is None and not trainer.is_deepspeed_enabled:
            skip_step(trainer.optimizer, skip)  # a scaler skips on its own, DeepSpeed has stepped

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(self.trainer.accelerator, "scaler", None) is None:
            step_taken(self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.device.type == "cpu" and args.world_size == 1 and self.finite.read().reached:
            control.should_log = True  # elsewhere looking costs a wait: the next log line looks
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        averaged_weights(self.trainer.optimizer)
        verdict = self.verdict()
        self.stop_if_reached(verdict)
        if verdict.streak:
            raise DivergedError(verdict.sentence(state.global_step, "training cannot end so"))

    # ---- what a checkpoint keeps ----

    def state(self) -> dict[str, Any]:
        """The open log window and the counts, as plain values; the same on every rank."""
        trainer = self.trainer
        kept: dict[str, Any] = {"nonfinite": list(self.verdict()[:3]), "told": self.told}
        loss = getattr(trainer, "_tr_loss", None)  # transformers < 5.2 keeps it to itself
        if loss is not None:
            several = trainer.args.world_size > 1
            loss = trainer.accelerator.gather(loss[None]).mean() if several else loss
            kept["window"] = {
                "parts": self._whole_sums(),
                "parts_since": self._since,
                "loss": float(loss),
                "since": trainer._globalstep_last_logged,
            }
        return kept

    def restore(self, kept: dict[str, Any]) -> None:
        """Continues as `state` left off.

        Args:
            kept: what `state` returned, through JSON; empty: a fresh start.
        """
        trainer, device = self.trainer, self.trainer.args.device
        self.told = kept.get("told", 0)
        streak, since, total = kept.get("nonfinite", (0, 0, 0))
        self.finite.load([streak, since, total, 0])
        self._sums, self._norms = {}, {}
        window = kept.get("window")
        if window is None or getattr(trainer, "_tr_loss", None) is None:
            return
        trainer._tr_loss += number(window["loss"])
        trainer._globalstep_last_logged = window["since"]
        if window["parts"]:
            args = trainer.args
            shared = args.world_size > 1 and args.average_tokens_across_devices
            values = [number(x) for x in window["parts"].values()]
            values = torch.tensor(values, dtype=torch.float32, device=device)
            ranks = args.world_size / trainer.context.size
            self._sums[tuple(window["parts"])] = values / ranks if shared else values
            self._since = window["parts_since"]
