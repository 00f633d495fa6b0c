"""The visual tokens of one sequence: those of its images and those of its videos."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.image_token import one_of
from groundkern.hf.data.spans import TokenSpans


class VisualTables(NamedTuple):
    """What geometry says of the images and videos of one sample.

    Args:
        image: fp64 [C, 5] of `image_geometry`.
        video: fp64 [C, 7] of `video_geometry`.
        images, videos: how many there are.
    """

    image: Tensor
    video: Tensor
    images: int
    videos: int

    def tokens(self, kind: str) -> list[int]:
        """How many visual tokens each image or video has; `kind` is "image" or "video"."""
        table, of = (self.image, self.images) if kind == "image" else (self.video, self.videos)
        return [int((table[:, 0] == number).sum()) for number in range(of)]


class VisualTokens(NamedTuple):
    """The visual tokens of a sequence, in their order: positions int64 [C], fp64 [C, 5] of places,
    videos counted behind the images, and fp64 [C, 2] of times (-1: of an image)."""

    position: Tensor
    table: Tensor
    times: Tensor


def visual_tokens(
    tables: VisualTables, ids: list[int], token: Mapping[str, int], name: str
) -> VisualTokens:
    """Find the visual tokens of a sequence.

    Args:
        tables: of its sample.
        ids: its token ids.
        token: by kind, "image" and perhaps "video", the id of visual tokens.
        name: what error messages call the sample.

    Raises:
        ValueError: another number of them than the tables have rows.
    """
    tokens = torch.tensor(ids, dtype=torch.int64)
    position = one_of(tokens, token.values()).nonzero()[:, 0]
    table = torch.full((len(position), 5), -1.0, dtype=torch.float64)
    times = torch.full((len(position), 2), -1.0, dtype=torch.float64)
    for kind, index in token.items():
        own, rows = tokens[position] == index, getattr(tables, kind)
        if int(own.sum()) != len(rows):
            wanted = f"{len(rows)} visual tokens by the processor's settings"
            fail(f"{name}: {kind}s", wanted, int(own.sum()))
        if kind == "image":
            table[own] = rows
        else:
            table[own] = torch.cat([rows[:, :1] + tables.images, rows[:, 3:]], 1)
            times[own] = rows[:, 1:3]
    return VisualTokens(position, table, times)


def check_spans(
    tables: VisualTables, spans: TokenSpans, ids: list[int], token: Mapping[str, int], name: str
) -> None:
    """Refuse placeholders that became another number of visual tokens than geometry says.

    Args:
        tables: of the sample.
        spans: what its placeholders became.
        ids: its token ids before truncation.
        token: as in `visual_tokens`.
        name: what error messages call the sample.

    Raises:
        ValueError: one did.
    """
    wanted = {kind: tables.tokens(kind) for kind in token}
    number = {kind: count() for kind in token}
    for kind, span in zip(spans.kinds, spans.images, strict=True):
        index, there = next(number[kind]), sum(ids[i] == token[kind] for i in span)
        tokens = wanted[kind][index]
        require(there == tokens, f"{name}: {kind}s[{index}]", f"{tokens} visual tokens", there)
