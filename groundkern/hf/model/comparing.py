"""What doctor compares: the ops' attention of a few rows with the model's in every layer that they
compute, and hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from groundkern.checks import require
from groundkern.hf.model.attention import RUN
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer, SideRows
from groundkern.hf.model.support import base_model
from groundkern.selection import KeySets


class ComparedAttention:
    """A reading: attention of rows over all their keys and over a set, beside the main pass's.

    Args:
        every: the rows, with every key allowed.
        some: the same rows with fewer keys.
    """

    uses_lse = alike = False

    def __init__(self, every: SideRows, some: SideRows) -> None:
        self.every, self.some = every, some
        self.off: list[float] = []  # of each layer: `every` against the main pass
        self.moved: list[float] = []  # of each layer: `some` against the main pass

    def rows_in(self, number: int) -> None:
        """None: it takes them itself."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Compare one layer."""
        rows = self.every.rows
        counted = rows.position >= 0
        sequence, position = rows.sequence.long(), rows.position.clamp(min=0).long()
        main = layer.out[sequence, position][counted].float()  # [N, Hq, Dv]
        found = (side.attend(layer).flatten(0, 1)[counted] for side in (self.every, self.some))
        largest = main.abs().max()
        off, moved = (float((x - main).abs().max() / largest) for x in found)
        self.off.append(off)
        self.moved.append(moved)


@torch.no_grad()
def compared_attention(
    model: nn.Module, inputs: dict[str, Tensor], every: SideRows, some: KeySets, backend: str
) -> ComparedAttention:
    """Run a model's own forward and compare its attention with the ops'.

    Args:
        model: the attached model.
        inputs: its own inputs.
        every: the rows, with every key allowed.
        some: fewer keys for each of them.
        backend: of the ops.

    Returns:
        What was compared; of no layer if the ops compute none.
    """
    compared = ComparedAttention(every, SideRows(every.rows, some))
    run = BodyRun(inputs["input_ids"].shape[1], backend, [compared])
    first = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)
    with few_logits(model, inputs["input_ids"].shape[1], first):
        model(**inputs, use_cache=False, **{RUN: run})
    return compared


@torch.no_grad()
def last_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model's own forward gives to its head, of which one token's logits are made.

    Args:
        model: bare or inside PEFT.
        inputs: its own inputs.

    Returns:
        [B, S, D].
    """
    length, seen = inputs["input_ids"].shape[1], []
    head = base_model(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)
    try:
        with few_logits(model, length, first):  # its hook comes after this one
            model(**inputs, use_cache=False)
    finally:
        hook.remove()
    require(seen[0].shape[1] == length, "model", "a head that is given every token", len(seen))
    return seen[0].float()


@contextmanager
def few_logits(model: nn.Module, length: int, positions: Tensor) -> Iterator[None]:
    """The head of a model is given some positions of a sequence and no others within the block.

    Not every forward has `logits_to_keep` (Qwen's Omni thinkers, VideoLLaMA3).

    Args:
        model: bare or inside PEFT.
        length: of the sequence; hidden states of other lengths are left alone.
        positions: int64 [K].
    """

    def keep(_: nn.Module, args: tuple) -> tuple:
        whole = args[0].dim() == 3 and args[0].shape[1] == length
        return (args[0][:, positions], *args[1:]) if whole else args

    handle = base_model(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
