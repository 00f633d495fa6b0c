"""The selections that the ops take, built from a batch's `gk_` tensors without a sync.

A batch's rows are [B, R], padded with -1 (`GroundedBatch`); the ops take them flat, N = B x R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import checks
from groundkern.hf.data.batch import GroundedBatch
from groundkern.selection import KeySets, QueryRows


def first_keys(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Find where each sequence begins after padding on the left.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S], nonzero for tokens; None: no padding.

    Returns:
        int32 [B]: the first attended key of each sequence.

    Raises:
        ValueError: a mask that is not [B, S], or one with holes (documents packed by masks, padding
            in the middle), if looking at it needs no sync.
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

    Args:
        inputs: the model's keyword inputs; `position_ids` [B, S], or Qwen's [3 or 4, B, S].
        attention_mask: [B, S] or None.

    Raises:
        ValueError: FlashAttention's cumulative lengths, or positions that start again, if looking
            at them needs no sync.
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
    """[B, R] positions as `QueryRows` of N = B x R, for each sliding window that a layer has.

    Args:
        position: [B, R], padded with -1.
        first_key: int32 [B], of `first_keys`.
    """

    def __init__(self, position: Tensor, first_key: Tensor) -> None:
        batch, rows = position.shape
        sequence = torch.arange(batch, dtype=torch.int32, device=position.device)
        self.sequence = sequence.repeat_interleave(rows)
        self.position = position.flatten().to(torch.int32)
        self.start = first_key.repeat_interleave(rows)
        self._windows: dict[int | None, QueryRows] = {}

    def at(self, window: int | None) -> QueryRows:
        """The rows of a layer, built once for each window.

        Args:
            window: the layer's sliding window, in tokens; None: full attention.

        Returns:
            N = B x R rows.
        """
        if window not in self._windows:
            self._windows[window] = QueryRows.causal(
                self.sequence, self.position, start=self.start, window=window
            )
        return self._windows[window]


def side_sets(s: GroundedBatch) -> KeySets:
    """What each aligned row may see: language tokens, and visual ones inside its regions.

    Args:
        s: the batch, with Rs aligned rows.

    Returns:
        Key sets of B x Rs rows; -1 for a row that is not restricted.

    Source: (S1), Omega.
    """
    batch, sets, length = s.side_inside.shape
    sequence = torch.arange(batch, device=s.image.device)
    index = torch.where(s.side_set >= 0, s.side_set + sequence[:, None] * sets, -1)
    index = torch.where(s.side_position >= 0, index, -1).flatten().to(torch.int32)
    inside = s.side_inside.reshape(batch * sets, length)
    return KeySets.regions(s.image >= 0, inside, sequence.repeat_interleave(sets), index)


def map_sets(s: GroundedBatch) -> KeySets:
    """The keys of each map row's own image.

    Args:
        s: the batch, with Rm map rows.

    Returns:
        One key set for each of B x Rm rows.

    Source: (K1).
    """
    same = s.image[:, None, :] == s.map_image[:, :, None]  # [B, Rm, S]
    rows = same.flatten(0, 1)
    index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return KeySets.from_bool(rows, index)


def word_images(s: GroundedBatch) -> Tensor:
    """Find the label bag of each labelled visual token.

    Args:
        s: the batch, with Rw labelled tokens and I images of a sample.

    Returns:
        int64 [B, Rw]: an index among the B x I bags; -1 for padding and tokens without a bag.

    Source: (D3), Y.
    """
    image = s.image.gather(1, s.word_position.clamp(min=0).long()).long()
    image = torch.where(s.word_position >= 0, image, -1)
    offset = torch.arange(len(image), device=image.device)[:, None] * s.word_bag.shape[1]
    return torch.where((image >= 0) & (image < s.word_bag.shape[1]), image + offset, -1)


def tokens_after(input_ids: Tensor, position: Tensor) -> Tensor:
    """The token that each row predicts.

    Args:
        input_ids: int64 [B, S].
        position: [B, R], padded with -1.

    Returns:
        int64 [B, R]; -100 for padding rows.
    """
    after = (position.clamp(min=0) + 1).clamp(max=input_ids.shape[1] - 1).long()
    return torch.where(position >= 0, input_ids.gather(1, after), -100)


def take_rows(x: Tensor, position: Tensor) -> Tensor:
    """Pick rows of each sequence, differentiably.

    Args:
        x: [B, S, D].
        position: [B, R], padded with -1.

    Returns:
        [B, R, D]; a padding row is a copy of row 0.
    """
    batch = torch.arange(len(x), device=x.device)[:, None]
    return x[batch, position.clamp(min=0).long()]
