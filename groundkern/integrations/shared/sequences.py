"""Rows of sequences that another program has tokenised, truncated and batched already.

Nothing is tokenised anew: answers are found in the decoded tokens (`answers`), and a region's words
are the tokens that overlap their characters. Trained tokens are those that the program gave labels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf import GroundedExample, GroundingCollator
from groundkern.hf.data.image_token import image_token_id, video_token_id
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields, pad_fields
from groundkern.hf.data.spans import Chat, TokenSpans
from groundkern.hf.data.visual import VisualTables, visual_tokens
from groundkern.integrations.shared.answers import UNTRAINED, decoded, located

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """What geometry asks of an image: (width, height) as the processor was given it."""

    size: tuple[int, int]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]


class SequenceRows(GroundingCollator):
    """Makes the `gk_` tensors of batches that another program made.

    `counts` are those of `GroundingCollator`, and `answers_unfound`, `regions_unfound`: answers
    whose text is not whole in the sequence, such as those that were cut, and their regions.

    Args:
        processor, config, settings: of `GroundingCollator`.
    """

    def __call__(
        self,
        examples: Sequence[GroundedExample],
        batch: dict[str, Any],
        features: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The batch with its rows.

        Args:
            examples: of each row of the batch; images are what the processor was given, or a
                `Picture` of their size.
            batch: `input_ids`, `attention_mask` and `labels`, [B, S], and what else a model takes.
            features: what the processor returned of all images; None: they are in the batch.

        Returns:
            The same and all `gk_` tensors.

        Raises:
            ValueError: a sample that does not fit, which the message names; packed sequences.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        flat = mask is not None and mask.dim() == 2 and len(ids) == len(examples)
        wanted = f"[{len(examples)}, S] with an attention mask, a sample in each row"
        require(flat, "input_ids", wanted, f"{list(ids.shape)}, packed or without a mask")
        kept = [row.bool() for row in batch["attention_mask"]]
        tables = self._places(examples, batch if features is None else features)
        fields = []
        for example, row, labels, keep, table in zip(
            examples, ids, batch["labels"], kept, tables, strict=True
        ):
            known = row[keep].tolist(), labels[keep].tolist()
            fields.append(self._of_sequence(example, *known, table))
        length = ids.shape[1]
        lengths = [int(keep.sum()) for keep in kept]
        left = any(bool(keep.any()) and not keep[0] for keep in kept)
        self._count_tokens(lengths, [length] * len(lengths))
        return {**batch, **pad_fields(fields, lengths, left=left, multiple=length)}

    def _places(
        self, examples: Sequence[GroundedExample], features: dict[str, Any]
    ) -> list[VisualTables]:
        """Where the visual tokens of each sample are, by one call."""
        images = [list(example.images) for example in examples]
        none = torch.zeros(0, 5, dtype=torch.float64)
        tables = self._reader.geometry(images, features) if any(images) else [none] * len(images)
        video = torch.zeros(0, 7, dtype=torch.float64)
        return [VisualTables(each, video, len(of), 0) for each, of in zip(tables, images)]

    def _of_sequence(
        self, example: GroundedExample, ids: list[int], labels: list[int], tables: VisualTables
    ) -> SampleFields:
        name = example.name
        token: Any = {"image": image_token_id(self.config, self.processor)}
        video = video_token_id(self.config, self.processor)
        require(video not in ids, f"{name}: videos", "none (images only)", "a video token")
        visual = visual_tokens(tables, ids, token, name)
        seen = decoded(self.processor.tokenizer, ids, labels, set(token.values()))
        unfound = self.counts["answers_unfound"]
        example, turns = located(example, seen, self.counts)
        if self.counts["answers_unfound"] and not unfound:
            logger.warning(
                "%s: an answer is not whole in its tokens (cut?): it has no rows, nor will others",
                name,
            )
        layout = Layout(
            example,
            Chat(seen.text, turns),
            TokenSpans(seen.offsets, [], partial(self._reader._blank, ids)),
            list(range(len(ids))),
            ids,
            self._reader.rules.ids,
            *visual,
        )
        self.counts["samples"] += 1
        fields = self._fields(layout)
        text = [p - 1 for p, label in enumerate(labels) if label != UNTRAINED and p > 0]
        self.counts["text_rows"] += len(text) - len(fields["text_position"])
        return fields | {"text_position": text}
