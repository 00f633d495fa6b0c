"""What trainers of other programs share: groundkern's mixin, and a watch for runs without rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from groundkern.hf import GroundingMixin, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.watching.even_ranks import ROWS
from groundkern.integrations.shared.settings import RunSettings
from groundkern.trainer.supervised import NEEDS

KINDS = {
    "smam": "aligned",
    "klal": "map",
    "margins": "map",
    "logit_lens": "raise",
    "patch_text": "contrast",
    "dv_sft": "word",
    "hist": "phrase",
}
"""By objective: its kind of row in `groundkern.hf.data.batch.COUNTS`."""


class RowWatch(TrainerCallback):
    """Ends a run in which an objective never had a row; the mixin's warning comes before it.

    It looks once: after an epoch of this process, or at the last step of a run that began here.

    Args:
        settings: of the run.
        trainer: that makes the steps.

    Raises:
        ValueError: an objective has had no row, on any rank; on every rank.
    """

    def __init__(self, settings: RunSettings, trainer: Trainer) -> None:
        self._needed = [name for name in settings.attached if name in KINDS]
        self._trainer = trainer
        self._rows: Tensor | None = None  # by kind, of this rank
        self._begun, self._steps_before = 0.0, 0
        self._open = bool(self._needed)

    def add(self, inputs: dict[str, Any]) -> None:
        """Adds the rows of a micro-batch.

        Args:
            inputs: of the model.
        """
        if self._open and ROWS in inputs:
            totals = inputs.get("gk_totals")  # of the whole step: it is asked only if there are any
            rows = row_counts(inputs) if totals is None else totals
            self._rows = rows if self._rows is None else self._rows + rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._steps_before = state.epoch or 0.0, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole_run = state.global_step >= state.max_steps and not self._steps_before
        if not self._open or not (whole_run or (state.epoch or 0.0) >= self._begun + 1):
            return
        self._open = False
        rows = torch.zeros(len(COUNTS), dtype=torch.int64) if self._rows is None else self._rows
        rows = self._trainer.accelerator.reduce(rows.to(args.device), reduction="sum")
        seen = dict(zip(COUNTS, rows.tolist(), strict=True))
        for name in self._needed:
            if not seen[KINDS[name]]:
                raise ValueError(
                    f"`objectives.{name}`: expected samples with {NEEDS[name][0]}, got none in "
                    f"{state.global_step - self._steps_before} steps; nothing was learned for it"
                )


class ProgramMixin(GroundingMixin):
    """`GroundingMixin` for the trainer of a program, which makes its arguments itself.

    Args:
        model, args, rest, kwargs: of `GroundingMixin`.
        settings: of the run.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        settings: RunSettings,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, *rest, examine=settings.examine, **kwargs)
        self.row_watch = RowWatch(settings, self)
        self.add_callback(self.row_watch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `GroundingMixin`; in training the rows are counted.

        Args:
            model, inputs, return_outputs, num_items_in_batch: as in transformers' Trainer.

        Returns:
            The loss, or (loss, GroundedOutput).
        """
        if model.training:
            self.row_watch.add(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def refuse(problems: list[tuple[str, Any, Any]], program: str) -> None:
    """Refuse what groundkern does not go together with.

    Args:
        problems: (the program's option, what is wanted, what it is), of those that do not fit.
        program: what the options are of.

    Raises:
        ValueError: there is one; all are named.
    """
    if problems:
        said = "; ".join(
            f"`{name}`: expected {wanted}, got {got}" for name, wanted, got in problems
        )
        raise ValueError(f"{program} with groundkern: {said}")
