"""The selections that the ops take, built from a batch's `gk_` tensors without a sync.

A batch's rows are [B, R], padded with -1 (`GroundedBatch`); the ops take N = B x R rows in a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import checks
from groundkern.hf.data.batch import GroundedBatch
from groundkern.selection import KeySets, QueryRows


def first_keys(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int32 [B]: the first attended key of each sequence (left padding).

    Raises:
        ValueError: a mask that is not [B, S], or (looked at where free) one with holes: documents
            packed by masks, or padding in the middle.
    """
    if attention_mask is None:
        return input_ids.new_zeros(len(input_ids), dtype=torch.int32)
    checks.tensor(
        "attention_mask", attention_mask, "B S", dict(zip("BS", input_ids.shape, strict=True))
    )
    attended = attention_mask.bool()
    if attended.numel() and checks.values_visible(attended):
        runs = attended[:, 0] + (attended[:, 1:] & ~attended[:, :-1]).sum(1)
        got = "padding in the middle"
        checks.require(int(runs.max()) <= 1, "attention_mask", "padding at the ends only", got)
    return attended.int().argmax(1).to(torch.int32)


def refuse_packing(inputs: dict, attention_mask: Tensor | None) -> None:
    """Refuse several documents in one sequence: side tokens and maps would see all of them.

    Raises:
        ValueError: FlashAttention's cumulative lengths, or (looked at where free) positions that
            start again.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"):
        if inputs.get(name) is not None:
            checks.fail(name, "one document to a sequence (no packing)", "packed documents")
    positions = inputs.get("position_ids")
    if positions is None or not checks.values_visible(positions):
        return
    # [B, S], or Qwen's [3 or 4, B, S] with time or text first
    text = positions if positions.dim() == 2 else positions[0]
    restarts = text.diff(dim=-1) < 0
    if attention_mask is not None:
        restarts = restarts & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if bool(restarts.any()):
        checks.fail(
            "position_ids", "one document to a sequence (no packing)", "positions that restart"
        )


class Rows:
    """[B, R] positions as `QueryRows` of N = B x R, for each sliding window that a layer has."""

    def __init__(self, position: Tensor, first_key: Tensor) -> None:
        batch, rows = position.shape
        sequence = torch.arange(batch, dtype=torch.int32, device=position.device)
        self.sequence = sequence.repeat_interleave(rows)
        self.position = position.flatten().to(torch.int32)
        self.start = first_key.repeat_interleave(rows)
        self._windows: dict[int | None, QueryRows] = {}

    def at(self, window: int | None) -> QueryRows:
        """The rows of a layer whose sliding window is `window` (None: full attention)."""
        if window not in self._windows:
            self._windows[window] = QueryRows.causal(
                self.sequence, self.position, start=self.start, window=window
            )
        return self._windows[window]


def side_sets(s: GroundedBatch) -> KeySets:
    """Omega of (S1) for each aligned row: language tokens, and visual ones inside its regions."""
    batch, sets, length = s.side_inside.shape
    sequence = torch.arange(batch, device=s.image.device)
    index = torch.where(s.side_set >= 0, s.side_set + sequence[:, None] * sets, -1)
    index = torch.where(s.side_position >= 0, index, -1).flatten().to(torch.int32)
    inside = s.side_inside.reshape(batch * sets, length)
    return KeySets.regions(s.image >= 0, inside, sequence.repeat_interleave(sets), index)


def map_sets(s: GroundedBatch) -> KeySets:
    """The keys of each map row's own image."""
    same = s.image[:, None, :] == s.map_image[:, :, None]  # [B, Rm, S]
    rows = same.flatten(0, 1)
    index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return KeySets.from_bool(rows, index)


def word_images(s: GroundedBatch) -> Tensor:
    """int64 [B, Rw]: each labelled token's bag among the B x I bags; -1 where it has none."""
    image = s.image.gather(1, s.word_position.clamp(min=0).long()).long()
    image = torch.where(s.word_position >= 0, image, -1)
    offset = torch.arange(len(image), device=image.device)[:, None] * s.word_bag.shape[1]
    return torch.where((image >= 0) & (image < s.word_bag.shape[1]), image + offset, -1)


def tokens_after(input_ids: Tensor, position: Tensor) -> Tensor:
    """int64 [B, R]: the token that each row predicts; -100 for padding rows."""
    after = (position.clamp(min=0) + 1).clamp(max=input_ids.shape[1] - 1).long()
    return torch.where(position >= 0, input_ids.gather(1, after), -100)


def take_rows(x: Tensor, position: Tensor) -> Tensor:
    """[B, S, D] -> [B, R, D], differentiable; a padding row takes row 0."""
    batch = torch.arange(len(x), device=x.device)[:, None]
    return x[batch, position.clamp(min=0).long()]
