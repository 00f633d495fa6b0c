"""Where a model looks while it is fed the gold answers: figures of each sample with regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern import metrics
from groundkern.hf import GroundedExample, GroundingCollator, attach, doctor
from groundkern.trainer.geometry import geometry_of
from groundkern.trainer.metrics import held_out
from groundkern.trainer.metrics.held_out import MEASURED, digit_tokens, to_device
from groundkern.trainer.metrics.tally import Tally, row_of

Figures = dict[str, list[float]]  # name: [sum, count]


class Grounding:
    """Measures samples of one model, which it attaches.

    Args:
        model: on its device.
        processor: the model's.
        allowed: special tokens that messages may hold as text.
        gradcam: measure GradCAM too, which keeps what a backward pass needs.
        map_rows: of the collator: the rows whose maps are read.

    Raises:
        ValueError, TypeError: the model cannot be attached.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        *,
        allowed: tuple[str, ...] = (),
        gradcam: bool = False,
        map_rows: str = MEASURED["map_rows"],
    ) -> None:
        self.collator = GroundingCollator(
            processor,
            model.config,
            allowed_tokens=allowed,
            geometry=geometry_of(model, processor),
            **{**MEASURED, "map_rows": map_rows},
        )
        self._records = ("maps", "contributions", *(["gradcam"] if gradcam else []))
        self.model = attach(model).eval()
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self._digits = digit_tokens(processor.tokenizer, vocabulary)

    def examine(self, examples: Iterable[GroundedExample]) -> None:
        """Have the doctor measure the model on the first sample that the collator takes.

        Raises:
            ValueError: the model fails, with the reason.
        """
        for example in examples:
            try:
                batch = self.collator([example])
            except ValueError:  # a bad sample, which is told when its turn comes
                continue
            doctor(self.model, to_device(batch, self.model.device))
            return

    def inputs(self, examples: Sequence[GroundedExample]) -> dict[str, Tensor]:
        """The batch of some examples, on the CPU.

        Raises:
            ValueError: an example that the collator does not take; the message names it.
        """
        return self.collator(list(examples))

    @torch.no_grad()
    def measure(self, batch: dict[str, Tensor]) -> list[Figures]:
        """The figures of each sample of a batch of `inputs`."""
        batch = to_device(batch, self.model.device)
        aligned = batch["gk_side_position"].shape[1] > 0
        output = self.model(**batch, gk_record=self._records if aligned else "maps")
        size = len(batch["labels"])
        tally = Tally(size)
        tally.begin(range(size), ())
        held_out.add_answers(tally, batch, output, self._digits)
        if output.maps is not None:
            held_out.add_attention(tally, batch, output.maps)
        if aligned:
            held_out.add_contributions(tally, batch, output.contributions)
            if output.gradcam is not None:
                _add_gradcam(tally, batch, output.gradcam)
        found = tally.by_sample()
        return [
            {
                name: [float(one.sums[at]), int(one.counts[at])]
                for name, one in found.items()
                if one.counts[at]
            }
            for at in range(size)
        ]


def _add_gradcam(tally: Tally, batch: dict, gradcam: Tensor) -> None:
    rows = batch["gk_side_position"] >= 0
    target = held_out.region_columns(batch)[rows]
    valid = (batch["gk_map_columns"] >= 0)[:, None].expand_as(gradcam)[rows]
    tally.add("gradcam_peak", metrics.peak_in_mask(gradcam[rows], target, valid), row_of(rows))
