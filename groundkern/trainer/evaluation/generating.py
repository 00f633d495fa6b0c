"""Greedy answers of batches of questions, with left padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from groundkern.hf.data.calling import tensors
from groundkern.hf.data.geometry.videos import check_videos
from groundkern.hf.data.spans import render_chat
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.evaluation.questions import Question


class Answer(NamedTuple):
    """What a model wrote.

    Args:
        text: without special tokens.
        raw: with them, as models write boxes in some notations.
        tokens: how many it wrote, the one that ends its turn included.
        ended: whether it ended its turn within the tokens it was given.
    """

    text: str
    raw: str
    tokens: int
    ended: bool


class Answerer:
    """Writes answers: the most likely token, one after another, until the turn ends.

    Nothing of the model's own generation settings is used but the tokens that end a turn: no
    sampling, beams, penalties or forced tokens. A turn ends with what `stop_tokens` finds.

    Args:
        model: a transformers model, bare or inside PEFT, on its device; attached or not.
        processor: the model's.
        max_new_tokens: of an answer at most.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, *, max_new_tokens: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor, self.max_new_tokens = processor, max_new_tokens
        self.stops = stop_tokens(self.model, processor)
        pad = processor.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stops or None,
            pad_token_id=self.stops[0] if pad is None and self.stops else pad,
        )

    def inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Keyword inputs of the model, on the CPU.

        Raises:
            SampleError: the processor does not take one of the questions.
        """
        try:
            return self._processed(questions)
        except (ValueError, TypeError, IndexError) as error:
            names = ", ".join(question.name for question in questions)
            raise SampleError(f"{names}: the processor does not take it: {error}") from None

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor]) -> list[Answer]:
        """The answers to the questions of `inputs`, in their order."""
        device, dtype = self.model.device, self.model.dtype
        moved = {
            name: x.to(device, dtype if x.is_floating_point() else None)
            for name, x in inputs.items()
        }
        written = self.model.generate(**moved)[:, inputs["input_ids"].shape[1] :]
        return [self._read(row) for row in written.tolist()]

    def resized(
        self, questions: Sequence[Question], inputs: dict[str, torch.Tensor]
    ) -> list[tuple[int, int] | None]:
        """(width, height) of what the processor made of each question's first image, in pixels.

        Args:
            questions: what `inputs` was made of.
            inputs: of `self.inputs`.

        Returns:
            None where there is no image, and for processors that do not report the grid of the
            whole image (`image_grid_thw`, of Qwen's families).
        """
        grids, patch = inputs.get("image_grid_thw"), _patch_size(self.processor)
        if grids is None or patch is None:
            return [None] * len(questions)
        ends = accumulate(len(question.images) for question in questions)
        first = [end - len(question.images) for end, question in zip(ends, questions)]
        sizes = [(patch * columns, patch * rows) for _, rows, columns in grids.tolist()]
        return [
            sizes[at] if question.images else None
            for at, question in zip(first, questions, strict=True)
        ]

    def _processed(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        texts = [question.text for question in questions]
        images = [list(question.images) for question in questions]
        videos = [list(question.videos) for question in questions]
        check_videos(self.model.config.model_type, [each for own in videos for each in own])
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            return tensors(self.processor, images, texts, videos, padding=True)
        finally:
            tokenizer.padding_side = side

    def _read(self, ids: list[int]) -> Answer:
        at = next((i for i, token in enumerate(ids) if token in self.stops), None)
        said = ids if at is None else ids[:at]
        pads = self.model.generation_config.pad_token_id
        read = self.processor.tokenizer.decode
        text, raw = read(said, skip_special_tokens=True), read([i for i in said if i != pads])
        return Answer(text, raw, len(ids) if at is None else at + 1, at is not None)


def _patch_size(processor: Any) -> int | None:
    found = getattr(getattr(processor, "image_processor", None), "patch_size", None)
    return found if isinstance(found, int) else None


def stop_tokens(model: torch.nn.Module, processor: Any) -> list[int]:
    """The tokens that end a turn.

    Those of the model's generation settings, the tokenizer's end of text, and the special token
    that the chat template writes behind an answer, since settings saved without it are common.

    Args:
        model: a transformers model.
        processor: the model's.

    Returns:
        Token ids, ascending.
    """
    tokenizer = processor.tokenizer
    found = model.generation_config.eos_token_id
    stops = {found} if isinstance(found, int) else set(found or ())
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for message in chat:
        message["content"] = [{"type": "text", "text": message["content"]}]
    try:
        rendered = render_chat(processor, chat, "chat")
    except Exception:  # a template of other wishes: what is known already has to do
        return sorted(stops)
    start, stop = rendered.turns[1].tail
    tail = tokenizer(rendered.text[start:stop], add_special_tokens=False).input_ids
    special = [token for token in tail if token in tokenizer.all_special_ids]
    return sorted(stops | set(special[:1]))
