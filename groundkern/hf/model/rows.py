"""Rows and key sets as the ops want them, built from a batch's `gk_` tensors without a sync.

The rows of a batch are [B, R], padded with -1 (`GroundedBatch`); an op is given N = B x R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.hf.data.batch import GroundedBatch
from groundkern.parallel import Shard, ShardedRows
from groundkern.selection import KeySets, QueryRows


class Chunk(NamedTuple):
    """Attention within chunks of so many tokens, counted from a row's first key (Llama 4)."""

    size: int


Window = int | Chunk | None
"""How far back rows see: so many tokens with their own, to the start of a chunk, or everything."""


class Rows:
    """[B, R] positions as `QueryRows` of N = B x R, for each window that a layer has.

    Args:
        position: [B, R], padded with -1.
        first_key: int32 [B, R], the first key that each row may see: of its sequence, without the
            padding, or of its document.
        unbounded: bool [B, R], rows that no window binds; None: there are none.
        shard: this rank's part of the sequences; None: it has them whole.
    """

    def __init__(
        self,
        position: Tensor,
        first_key: Tensor,
        unbounded: Tensor | None = None,
        shard: Shard | None = None,
    ) -> None:
        batch, rows = position.shape
        sequence = torch.arange(batch, dtype=torch.int32, device=position.device)
        self.sequence = sequence.repeat_interleave(rows)
        self.position = position.flatten().to(torch.int32)
        self.start = first_key.flatten()
        self.unbounded = None if unbounded is None else unbounded.flatten()
        self.shape = batch, rows
        self.shard = shard
        self._windows: dict[Window, QueryRows] = {}
        self._sharded: dict[Window, ShardedRows] = {}

    @property
    def rows(self) -> int:
        """R, of each sequence."""
        return self.shape[1]

    def at(self, window: Window) -> QueryRows:
        """The rows of a layer, built once for each window.

        Args:
            window: the layer's.

        Returns:
            N = B x R rows.
        """
        if window not in self._windows:
            self._windows[window] = QueryRows.causal(
                self.sequence, self.position, start=self._start(window), most=self.rows
            )
        return self._windows[window]

    def sharded(self, window: Window) -> ShardedRows:
        """The same where sequences are split over ranks.

        Args:
            window: the layer's.

        Returns:
            N rows, of which each rank owns some.
        """
        if window not in self._sharded:
            self._sharded[window] = ShardedRows(self.at(window), self.shard)
        return self._sharded[window]

    def queries(self) -> tuple[Tensor, Tensor]:
        """Where this rank has queries of the rows: sequence and position [N], of its own tokens."""
        if self.shard is None:
            return self.sequence, self.position
        own = self.sharded(None).own
        return self.sequence[own], self.shard.before(self.position[own].clamp(min=0))

    def _start(self, window: Window) -> Tensor:
        """int32 [N]: the first key that a row sees."""
        if window is None:
            return self.start
        place = (self.position - self.start).clamp(min=0)
        if isinstance(window, Chunk):
            start = self.start + place // window.size * window.size
        else:
            start = self.start + (place + 1 - window).clamp(min=0)
        return start if self.unbounded is None else torch.where(self.unbounded, self.start, start)


def side_sets(
    batch: GroundedBatch, shard: Shard | None = None, *, kept: Tensor | None = None
) -> KeySets:
    """What each aligned row may see: language tokens, and visual ones inside its regions.

    Args:
        batch: the batch, with Rs aligned rows.
        shard: whose keys the sets are of; None: all.
        kept: bool [B, S], visual tokens that sets have too that hold another one of their image.

    Returns:
        Key sets of B x Rs rows; -1 for a row that is not restricted.

    Source: (S1), (S6), Omega.
    """
    sequences, sets, length = batch.side_inside.shape
    sequence = torch.arange(sequences, device=batch.image.device)
    index = torch.where(batch.side_set >= 0, batch.side_set + sequence[:, None] * sets, -1)
    index = torch.where(batch.side_position >= 0, index, -1).flatten().to(torch.int32)
    inside = batch.side_inside
    if kept is not None:
        inside = inside | (kept[:, None] & _of_touched_images(inside, batch.image))
    inside, visual = inside.reshape(sequences * sets, length), batch.image >= 0
    if shard is not None:
        inside, visual = shard.take(inside), shard.take(visual)
    return KeySets.regions(visual, inside, sequence.repeat_interleave(sets), index)


def _of_touched_images(inside: Tensor, image: Tensor) -> Tensor:
    """bool [B, G, S]: visual tokens of images of which a set has a token."""
    number = image.clamp(min=0, max=image.shape[1] - 1).long()[:, None].expand(inside.shape)
    visual = (image >= 0)[:, None]
    touched = torch.zeros_like(inside, dtype=torch.int32)
    touched.scatter_reduce_(2, number, (inside & visual).int(), "amax")  # [B, G, images]
    return (touched.gather(2, number) > 0) & visual


def map_sets(batch: GroundedBatch, shard: Shard | None = None) -> KeySets:
    """The keys of each map row's own image.

    Args:
        batch: the batch, with Rm map rows.
        shard: whose keys the sets are of; None: all.

    Returns:
        One key set for each of B x Rm rows.

    Source: (K1).
    """
    image = batch.image if shard is None else shard.take(batch.image)
    same = image[:, None, :] == batch.map_image[:, :, None]  # [B, Rm, S]
    rows = same.flatten(0, 1)
    index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return KeySets.from_bool(rows, index)


def word_images(batch: GroundedBatch) -> Tensor:
    """Find the label bag of each labelled visual token.

    Args:
        batch: the batch, with Rw labelled tokens and I images of a sample.

    Returns:
        int64 [B, Rw]: an index among the B x I bags; -1 for padding and tokens without a bag.

    Source: (D3), Y.
    """
    image = batch.image.gather(1, batch.word_position.clamp(min=0).long()).long()
    image = torch.where(batch.word_position >= 0, image, -1)
    offset = torch.arange(len(image), device=image.device)[:, None] * batch.word_bag.shape[1]
    return torch.where((image >= 0) & (image < batch.word_bag.shape[1]), image + offset, -1)


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
