"""The collator that axolotl builds: rows of its data set in, one grounded batch out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from groundkern.hf import GroundingCollator
from groundkern.integrations.axolotl.rows import example_of
from groundkern.integrations.axolotl.settings import GroundkernSection


class RowCollator(GroundingCollator):
    """`GroundingCollator` of rows, by the constructor that axolotl calls.

    Args:
        tokenizer: axolotl's first argument, which is the processor's.
        processor: the model's, with the chat template of the run.
        model_config: the model's config.
        section: what the YAML says.
        root: the folder that image paths start from.
        seed: of what a control draws.
        multiple: what lengths are a multiple of.
        ignored: axolotl's settings of padding, which its own collator for images ignores too.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        processor: Any,
        model_config: Any,
        section: GroundkernSection,
        root: Path,
        seed: int,
        multiple: int,
        **ignored: Any,
    ) -> None:
        super().__init__(
            processor,
            model_config,
            max_length=section.max_length,
            pad_to_multiple_of=multiple,
            control_seed=seed,
            **section.collating,
        )
        self.tokenizer, self.root, self.max_pixels = tokenizer, root, section.max_pixels

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: of the data set, one or more.

        Returns:
            Keyword inputs of the model, as `GroundingCollator` makes them.

        Raises:
            ValueError: a bad sample, which the message names.
        """
        limits = {"root": self.root, "max_pixels": self.max_pixels}
        return super().__call__([example_of(row, **limits) for row in rows])
