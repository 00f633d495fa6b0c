"""Attention of packed rows, document by document.

With a mask that keeps documents apart, `scaled_dot_product_attention` computes whole rows: S x S
products for a row of S tokens, whatever is in it. One call for each document computes those that
count, without a mask if the document's own is causal. FlashAttention does the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern.hf.model.documents import Documents
from groundkern.lse import lse_of_graph


class Attended(NamedTuple):
    """What attention of packed rows came to."""

    out: Tensor  # [R, S, Hq, Dv]
    lse: Tensor | None  # [R, Hq, S] of each row over its document's keys, if torch saved it


def attend_apart(
    attention: Callable,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    documents: Documents,
    kwargs: dict,
    *,
    saved: bool,
) -> Attended:
    """Call an attention function once for each document.

    Args:
        attention: transformers' function around torch's `scaled_dot_product_attention`.
        module: the attention layer.
        tensors: query, key and value [R, H, S, D] of the main tokens.
        mask: [R or 1, H or 1, S, S] of the rows; None: each document is causal.
        documents: of the rows.
        kwargs: of the attention function.
        saved: whether the log-sum-exp that torch saves for its backward can be read.

    Returns:
        What one call for all rows would have returned.
    """
    rows, statistics = [], []
    for row, (lengths, *parts) in enumerate(
        zip(documents.row_lengths, *(x.split(1) for x in tensors), strict=True)
    ):
        start, outs = 0, []
        # split and not slices, whose gradients would each be as long as the row
        for q, k, v in zip(*(x.split(lengths, 2) for x in parts), strict=True):
            stop = start + q.shape[2]
            own = mask if mask is None else mask[row % len(mask), None, :, start:stop, start:stop]
            out, _ = attention(module, q, k, v, own, **kwargs)
            outs.append(out)
            statistics.append(lse_of_graph(out, q) if saved else None)
            start = stop
        rows.append(torch.cat(outs, 1))
    return Attended(torch.cat(rows), _joined(statistics, documents))


def _joined(statistics: list[Tensor | None], documents: Documents) -> Tensor | None:
    """[R, Hq, S] of the documents' [1, Hq, L]; None if one is not known."""
    if any(lse is None for lse in statistics):
        return None
    known = iter(statistics)
    rows = [[next(known)[..., :length] for length in row] for row in documents.row_lengths]
    return torch.cat([torch.cat(row, 2) for row in rows])
