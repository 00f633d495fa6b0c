"""The documents of packed rows: where each begins, each alone, and what keeps them apart.

A packed row has no attention mask; its text positions start again at each document. Where the next
position is not one more, another document begins: that is transformers' own rule.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from groundkern import checks
from groundkern.checks import fail

FLASH_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Documents:
    """The documents of a batch of rows; padding behind the last one is one more.

    Nothing here waits for the device but `size`, `several`, `lengths`, `row_lengths` and what uses
    them.

    Args:
        positions: integers [R, S], text positions.

    Raises:
        ValueError: (checked if that needs no sync) a document whose positions do not start at 0
            beside another one.
    """

    def __init__(self, positions: Tensor) -> None:
        self.new = torch.ones_like(positions, dtype=torch.bool)  # [R, S], a document's first token
        self.new[:, 1:] = positions.diff(dim=1) != 1
        place = torch.arange(positions.shape[1], device=positions.device)
        self.start = torch.where(self.new, place, 0).cummax(1).values  # [R, S]
        self.place = place - self.start  # [R, S], of a token in its document
        if checks.values_visible(positions) and self.several:
            first = positions[self.new]
            got = f"one that starts at {int(first.max())}"
            wanted = "positions that count from 0 in every document of a packed row"
            checks.require(bool((first == 0).all()), "position_ids", wanted, got)

    @cached_property
    def number(self) -> Tensor:
        """int64 [R, S]: the document of each token, counted through all rows."""
        return (self.new.flatten().cumsum(0) - 1).view_as(self.place)

    @cached_property
    def several(self) -> bool:
        """Whether any row has more than one."""
        return bool(self.new[:, 1:].any())

    @cached_property
    def row_lengths(self) -> list[list[int]]:
        """The tokens of each document, row by row."""
        rows, length = self.new.shape
        starts: list[list[int]] = [[] for _ in range(rows)]
        for row, start in self.new.nonzero().tolist():
            starts[row].append(start)
        return [[b - a for a, b in pairwise([*each, length])] for each in starts]

    @cached_property
    def size(self) -> tuple[int, int]:
        """How many documents there are, and the tokens of the longest."""
        documents, longest = torch.stack((self.number[-1, -1], self.place.max())).tolist()
        return documents + 1, longest + 1

    def unpack(self, x: Tensor, padding: int = 0) -> Tensor:
        """Each document alone.

        Args:
            x: [R, S].
            padding: fills the ends of shorter documents.

        Returns:
            [D, L]: as many sequences as there are documents, as long as the longest.
        """
        alone = x.new_full(self.size, padding)
        alone[self.number, self.place] = x
        return alone

    def pack(self, x: Tensor) -> Tensor:
        """[D, L, ...] of each document alone as [R, S, ...]."""
        return x[self.number, self.place]

    def alone(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A model's inputs with a document to a sequence, padded on the right.

        Images stay as they are: packed or not, they are in the order of the documents.

        Args:
            inputs: packed keyword inputs.

        Returns:
            The inputs with an attention mask and without positions.
        """
        shape = self.new.shape
        found = {
            name: self.unpack(x) if isinstance(x, Tensor) and x.shape == shape else x
            for name, x in inputs.items()
            if name != "position_ids"
        }
        ones = torch.ones_like(self.place)
        return {**found, "attention_mask": self.unpack(ones)}

    def padding(self, input_ids: Tensor, trained: Tensor) -> Tensor:
        """Which tokens fill the ends of rows.

        Args:
            input_ids: [R, S].
            trained: [R, Rt] rows of text, padded with -1.

        Returns:
            bool [R, S]: a row's last document, if all its tokens are the same and none is trained.
        """
        last = self.start == self.start[:, -1:]
        other = (last & (input_ids != input_ids[:, -1:])).any(1, keepdim=True)
        learned = (trained >= self.start[:, -1:]).any(1, keepdim=True)
        begins = self.start[:, -1:] > 0  # a row that is nothing but one document has no padding
        return last & ~other & ~learned & begins

    @cached_property
    def lengths(self) -> dict[str, Any]:
        """FLASH_LENGTHS of the rows laid end to end, as FlashAttention's packed kernel takes them.

        The longest document is not asked for: the length of a row bounds it.
        """
        first = self.new.flatten().nonzero()[:, 0]
        ends = torch.cat((first, first.new_tensor([self.new.numel()]))).to(torch.int32)
        longest = self.new.shape[1]
        return dict(zip(FLASH_LENGTHS, (ends, ends, longest, longest), strict=True))

    def check_lengths(self, inputs: dict[str, Any]) -> None:
        """Compare lengths that a collator gave with the positions, if that needs no sync.

        Args:
            inputs: keyword inputs, perhaps with some of FLASH_LENGTHS.

        Raises:
            ValueError: other documents than those of `position_ids`.
        """
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            given = inputs.get(name)
            if given is None or not checks.values_visible(given, self.new):
                continue
            own = self.lengths[name]
            agree = given.shape == own.shape and bool((given == own).all())
            checks.require(agree, name, "the documents of position_ids", given.tolist())

    def refuse_leak(self, mask: Any) -> bool:
        """Raise if a row's mask shows it keys of another document.

        Args:
            mask: as an attention function gets it: [R, 1 or H, T, T] of bool or of numbers that
                are added; the first S are those of the rows; None: causal.

        Returns:
            Whether the mask says that documents are apart and causal, and nothing else.

        Raises:
            ValueError: it does.
        """
        wanted = "a mask that keeps the documents of a packed row apart"
        if mask is None:
            if self.several:
                fail("attention_mask", wanted, "none: the decoder does not look at position_ids")
            return True
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return False  # FlexAttention's, which is made by the same function of keys and rows
        length = self.new.shape[1]
        mask = mask[:, :, :length, :length]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        apart = self.number[:, :, None] != self.number[:, None, :]  # [R, S, S]
        if bool((seen.any(1) & apart).any()):
            fail("attention_mask", wanted, "one that shows a token those of another document")
        place = torch.arange(mask.shape[-1], device=mask.device)
        causal = ~apart & (place[:, None] >= place)  # [R, S, S]
        return mask.dtype == torch.bool and bool((mask == causal[:, None]).all())
