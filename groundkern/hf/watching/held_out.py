"""Exact means over a held-out set: every term over its own rows, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from groundkern.hf.data.batch import COUNTS, FIELDS, row_counts
from groundkern.hf.model.rows import tokens_after
from groundkern.hf.model.support import all_terms
from groundkern.hf.model.terms import part_rules
from groundkern.hf.objectives import Objectives
from groundkern.hf.output import GroundedOutput

TEXT, WORD = "token_accuracy", "word_accuracy"
ACCURACIES = (TEXT, WORD)
"""Held-out figures that are better when they are higher; all others are losses."""


def held_out_names(objectives: Objectives) -> list[str]:
    """The figures that an evaluation may have, without `eval_`.

    Args:
        objectives: what is attached.

    Returns:
        The loss, its parts, those of SMAM, DV-SFT and KLAL if they are not attached, accuracies;
        without terms of GradCAM maps, which need gradients.
    """
    parts = part_rules(all_terms(objectives))
    if "hist" in objectives.gradcam:
        del parts["composition"]
    if "margins" in objectives.gradcam:
        del parts["margin_mean"], parts["margin_max"]
    return ["loss", *parts, *ACCURACIES]


class HeldOutMeans:
    """Adds up what batches of an evaluation measured, and divides once.

    Args:
        objectives: what is attached; their weights make the loss.
        device: where the sums are kept.
    """

    def __init__(self, objectives: Objectives, device: torch.device) -> None:
        own = part_rules(objectives, routers=True)
        self._weights = {name: rule.weight for name, rule in own.items()}
        self._rules = part_rules(all_terms(objectives), routers=True)
        self._names = (*self._rules, *ACCURACIES)
        self.batches = 0  # grounded ones
        kind = torch.float32 if device.type == "mps" else torch.float64
        # values, what they are divided by, and rows
        self._sums = torch.zeros(3, len(self._names), dtype=kind, device=device)

    def add(self, batch: Mapping[str, Tensor], output: GroundedOutput) -> None:
        """Adds a grounded batch.

        Args:
            batch: what the model was given.
            output: what it returned, its parts divided by the batch's own counts.
        """
        self.batches += 1
        counts = dict(zip(COUNTS, row_counts(batch).to(self._sums).unbind(), strict=True))
        found = {}
        for name, part in output.parts.items():
            rule = self._rules[name]
            count = counts[rule.count]
            value = torch.where(count > 0, part.to(count) * count, 0.0)
            found[name] = (value, count, counts[rule.rows])
        position = batch["gk_text_position"]
        target = tokens_after(batch["input_ids"], position)
        found[TEXT] = _hits(output.text_predicted, target, position)
        if output.word_predicted is not None and "gk_word_position" in batch:
            count = counts["word"]
            right = (output.word_predicted[..., None] == word_labels(batch)).any(-1)
            hits = (right & (batch["gk_word_position"] >= 0)).sum().to(count)
            found[WORD] = (hits, count, count)
        self._add(found)

    def add_plain(self, batch: Mapping[str, Tensor], loss: Tensor) -> None:
        """Adds a batch without rows, whose loss is the mean over its trained tokens.

        Args:
            batch: with labels.
            loss: the model's own.
        """
        count = (batch["labels"][:, 1:] != -100).sum().to(self._sums)
        value = torch.where(count > 0, loss.detach().to(count) * count, 0.0)
        self._add({"text": (value, count, count)})

    def measured(self, gather: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Whether any rank has seen a grounded batch.

        Args:
            gather: of accelerate, with several ranks.
        """
        batches = self._sums.new_tensor([self.batches])
        return bool((batches if gather is None else gather(batches)).any())

    def _add(self, found: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        nothing = (self._sums.new_zeros(()),) * 3
        columns = [torch.stack(found.get(name, nothing)) for name in self._names]
        self._sums += torch.stack(columns, 1)

    def means(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The mean of every part and accuracy that has a row, and the loss.

        Args:
            gather: of accelerate, with several ranks.

        Returns:
            Figures by name; the loss is the weighted sum of the parts that have rows.
        """
        sums = self._sums if gather is None else gather(self._sums[None]).sum(0)
        columns = zip(self._names, *sums.tolist(), strict=True)
        means = {name: value / count for name, value, count, rows in columns if rows}
        weighted = [self._weights[name] * means[name] for name in self._weights if name in means]
        return {"loss": sum(weighted), **means} if weighted else means


def word_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """What a labelled visual token may be read as: any of its labels (D5).

    Args:
        batch: with `gk_word_label`, and `gk_several_label` where tokens have several.

    Returns:
        int64 [B, Rw, L], at least one wide; -2 is padding, which is nothing that is predicted.
    """
    first = batch["gk_word_label"][..., None].long()
    several = batch.get("gk_several_label", first[..., :0]).long()
    alone = (several < 0).all(-1, keepdim=True)
    found = torch.cat((torch.where(alone, first, -1), several), -1)
    return found.masked_fill(found < 0, -2)


def _hits(predicted: Tensor, target: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = position >= 0
    count = rows.sum().double()
    return ((predicted == target) & rows).sum().double(), count, count


def without_repeats(batch: Mapping[str, Tensor], real: int) -> dict[str, Tensor]:
    """A batch whose last samples only fill it up: they keep their inputs and teach nothing.

    Args:
        batch: with or without `gk_` tensors.
        real: how many of its first samples count.

    Returns:
        The batch, in the shapes it had.
    """
    made = dict(batch)
    if "labels" in batch:
        made["labels"] = batch["labels"].clone()
        made["labels"][real:] = -100
    for name, spec in FIELDS.items():
        key = f"gk_{name}"
        if key in batch and (spec.supervises or name == "image"):  # visual tokens count too
            made[key] = batch[key].clone()
            made[key][real:] = spec.padding
    return made
