"""What trainers of other programs share: groundkern's mixin, and a watch for runs without rows."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from groundkern.hf import GroundingMixin, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.integrations.run_settings import NEEDS, Settings

logger = logging.getLogger(__name__)
EARLY = 20  # optimizer steps without a row after which a run says so


class RowWatch(TrainerCallback):
    """Says that an objective has had no rows, and ends the run that never had one.

    Args:
        settings: of the run.

    Raises:
        ValueError: from the end of the first epoch, or of the training, if an objective has had no
            row until then. The counts are those of all ranks, so that every rank raises.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = dict.fromkeys((kind for kind, _ in NEEDS.values()), 0)

    def add(self, totals: Tensor) -> None:
        """Adds the rows of a micro-batch, or of a step: it is asked only whether there were any."""
        found = dict(zip(COUNTS, totals.tolist(), strict=True))
        for kind in self._seen:
            self._seen[kind] += found[kind]

    def without(self) -> list[str]:
        """A sentence for each objective that has had no row."""
        return [
            f"`objectives.{name}`: expected samples with {field}, got none so far"
            for name in self._settings.on
            for kind, field in [NEEDS.get(name, (None, ""))]
            if kind is not None and not self._seen[kind]
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missing = self.without()
        if missing and (state.global_step >= state.max_steps or (state.epoch or 0) >= 1):
            raise ValueError(
                f"{missing[0]} ({state.global_step} steps); nothing was learned for it"
            )
        if missing and state.global_step == EARLY:
            logger.warning("%s (%s steps)", missing[0], EARLY)


class ProgramMixin(GroundingMixin):
    """`GroundingMixin` for the trainer of a program, which makes its arguments itself.

    Args:
        model, args, rest, kwargs: of `GroundingMixin`.
        settings: of the run.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *rest: Any, settings: Settings, **kwargs: Any
    ) -> None:
        super().__init__(model, args, *rest, examine=settings.examine, **kwargs)
        self.row_watch = RowWatch(settings)
        self.add_callback(self.row_watch)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As `GroundingMixin`; in training the rows are counted.

        Args:
            model, inputs, return_outputs, num_items_in_batch: as in transformers' Trainer.

        Returns:
            The loss, or (loss, GroundedOutput).
        """
        if model.training and self.row_watch.without():
            totals = inputs.get("gk_totals")
            self.row_watch.add(row_counts(inputs) if totals is None else totals)
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
