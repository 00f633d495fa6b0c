"""Attention on the evidence as a reward function of TRL's GRPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Region
from groundkern.hf.data.rollouts import check_region
from groundkern.hf.model.sharded import sharded
from groundkern.hf.model.support import base_model
from groundkern.metrics import attention_reward, high_entropy

MESSAGES = "conversational prompts, whose completions are lists of messages"


class AttentionReward:
    """A reward for completions whose attention is on the regions of their sample.

        GroundedGRPOTrainer(model, reward_funcs=[AttentionReward(processor), right_answer], ...)

    It reads the completion's text, tokenised anew, in one forward pass without gradients for each
    `batch_size` of them. The data set has a column `regions` (`check_region`); a completion without
    any has no reward (None).

    Args:
        processor: the model's.
        layer: the decoder layer whose head mean is read, among those of softmax attention.
        entropy: the share of a completion's rows that count, those of the highest entropy.
        batch_size: completions of a forward pass.

    Raises:
        ValueError: in a call, a region of another form, or texts without messages.

    Source: SAYO (arXiv 2602.08241), (R4); its code reads the last layer and .3 of the rows.
    """

    __name__ = "attention"  # what TRL logs it as
    processor: Any
    layer: int
    entropy: float
    batch_size: int

    def __init__(
        self, processor: Any, *, layer: int = -1, entropy: float = 0.3, batch_size: int = 8
    ) -> None:
        require(0.0 < entropy <= 1.0, "entropy", "a number in (0, 1]", entropy)
        self.processor, self.layer = processor, layer
        self.entropy, self.batch_size = entropy, batch_size
        self.trainer: Any = None  # a `RolloutMixin`, which says so
        self._collator: GroundingCollator | None = None  # of the trainer's model

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        regions: Sequence[Any] | None = None,
        images: Sequence[Any] | None = None,
        image: Sequence[Any] | None = None,
        **others: Any,
    ) -> list[float | None]:
        """Rewards of some completions.

        Args:
            prompts, completions: lists of messages.
            regions, images, image: columns of the data set.
            others: what else TRL hands over, which is not read.

        Returns:
            A reward in [-1, 1] for each, or None.
        """
        if self.trainer is None:
            fail("reward_funcs", "a trainer with RolloutMixin, whose model it reads", "another")
        if images is None:
            images = [[] if one is None else [one] for one in image or [None] * len(prompts)]
        found: list[float | None] = [None] * len(prompts)
        of_each = regions or [None] * len(prompts)
        with_regions = [i for i, own in enumerate(of_each) if own]
        # where weights are sharded a forward pass is a collective: every rank takes as many
        chosen = range(len(prompts)) if regions and sharded(self.trainer.model) else with_regions
        for start in range(0, len(chosen), self.batch_size):
            part = chosen[start : start + self.batch_size]
            examples = [
                _example(prompts[i], completions[i], images[i] or [], of_each[i] or [], i)
                for i in part
            ]
            for i, reward in zip(part, self._rewards(examples), strict=True):
                found[i] = reward if of_each[i] else None
        return found

    @torch.no_grad()
    def _rewards(self, examples: list[GroundedExample]) -> list[float]:
        model = self.trainer.model
        if self._collator is None:
            levels = (1.0, 0.0, 0.0)
            self._collator = GroundingCollator(
                self.processor,
                base_model(model).config,
                map_rows="answer",
                map_kind="uniform",
                map_levels=levels,
            )
        device = next(model.parameters()).device
        batch = {name: x.to(device) for name, x in self._collator(examples).items()}
        record = ("maps", "visible", "layers")
        output = model(**batch, gk_record=record, gk_temperature=1.0)
        columns, row = batch["gk_map_columns"], batch["gk_map_position"]
        if not columns.shape[1] or not row.shape[1]:
            return [0.0] * len(examples)
        inside = (batch["gk_map_target"] > 0).any(1) & (columns >= 0)
        counted = row >= 0
        entropy = _at(output.text_entropy, batch["gk_text_position"], row, batch["input_ids"])
        counted = high_entropy(entropy, counted, self.entropy)
        maps = output.maps[:, :, self.layer]
        return attention_reward(maps, inside, columns >= 0, counted).tolist()


def _at(values: Tensor, position: Tensor, wanted: Tensor, like: Tensor) -> Tensor:
    """[B, R]: values [B, Rt] of rows at some positions, for rows at others; 0 where there is
    none."""
    whole = values.new_zeros(len(like), like.shape[1] + 1)
    whole.scatter_(1, torch.where(position >= 0, position, like.shape[1]).long(), values)
    return whole[:, :-1].gather(1, wanted.clamp(min=0).long())


def _example(
    prompt: Any, completion: Any, images: Sequence[Any], regions: Sequence[Any], index: int
) -> GroundedExample:
    for name, messages in (("prompts", prompt), ("completions", completion)):
        require(isinstance(messages, list), f"{name}[{index}]", MESSAGES, type(messages).__name__)
    chat = [_plain(message) for message in (*prompt, *completion)]
    turn = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
    text = chat[turn]["content"]
    if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text)
    made = []
    for number, region in enumerate(regions):
        check_region(region, len(images), f"regions[{index}][{number}]")
        shapes = {name: _tuples(of) for name, of in region.items() if name != "image" and of}
        if text.strip():
            made.append(Region(turn, 0, len(text), int(region.get("image") or 0), **shapes))
    return GroundedExample(tuple(images), chat, tuple(made), name=f"completion {index}")


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the images that TRL puts into it, which are given beside it."""
    content = message["content"]
    if isinstance(content, list):
        content = [{k: v for k, v in part.items() if k in ("type", "text")} for part in content]
    return {"role": message["role"], "content": content}


def _tuples(shape: Any) -> Any:
    return tuple(map(_tuples, shape)) if isinstance(shape, (list, tuple)) else shape
