"""The queries of a few rows beside the main pass, with one gradient for both.

`rows.take(q)` alone has a backward that fills a tensor like q with zeros, adds the rows to it, and
leaves autograd to add that to the main pass's gradient: four passes over [B, Hq, S, D] in every
layer, for a few rows. Here the main pass gets its queries from the same node, so that the node's
backward is given the gradients of both and adds the rows where they are. With side tokens it also
cuts them off: the backward of that cut has to make a whole tensor anyway, and the rows are added to
it in place. Without side tokens they are added to a copy of the main pass's gradient (two passes),
because Python cannot tell that nobody else holds a gradient that autograd hands over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundkern.kept import kept
from groundkern.selection import QueryRows


def take_beside(
    query: Tensor, length: int, selections: Sequence[QueryRows]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The queries of the main pass, and those of rows.

    Args:
        query: [B, Hq, T, D] of all tokens.
        length: S, of the main pass; what follows are side tokens.
        selections: N rows each.

    Returns:
        [B, Hq, S, D], and [N, Hq, D] by the id of the rows. torch.compile, which fuses what this
        spares, gets an empty dict, and so does a call without gradients.
    """
    compiled = torch.compiler.is_compiling()
    if compiled or not selections or not (torch.is_grad_enabled() and query.requires_grad):
        return query[:, :, :length], {}
    distinct = list({id(rows): rows for rows in selections}.values())
    q, *taken = _TakeBeside.apply(query, length, distinct)
    return q, {id(rows): x for rows, x in zip(distinct, taken, strict=True)}


class _TakeBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, length: int, selections: list[QueryRows]):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.length, ctx.selections = query.shape, length, selections
        return query[:, :, :length], *(rows.take(query) for rows in selections)

    @staticmethod
    def backward(ctx, main: Tensor | None, *taken: Tensor | None):
        present = [(r, x) for r, x in zip(ctx.selections, taken, strict=True) if x is not None]
        if main is None and not present:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph: in operations that differentiate again
            return _differentiable(ctx.shape, ctx.length, main, present), None, None
        if not present and ctx.length == ctx.shape[2]:
            return main, None, None
        gradient = _whole(ctx.shape, ctx.length, main, [x for _, x in present])
        for rows, x in present:
            _add_rows(gradient, rows, x)
        return gradient, None, None


def _whole(shape: torch.Size, length: int, main: Tensor | None, like: Sequence[Tensor]) -> Tensor:
    """The main pass's gradient as one of all tokens that nobody else holds."""
    if main is None:
        return like[0].new_zeros(shape)
    if length == shape[2]:
        return main.clone(memory_format=torch.contiguous_format)
    batch, heads, total, dim = shape
    gradient = main.new_empty(batch, total, heads, dim).transpose(1, 2)  # as projections lay it
    gradient[:, :, :length] = main
    gradient[:, :, length:] = 0.0
    return gradient


def _add_rows(gradient: Tensor, rows: QueryRows, x: Tensor) -> None:
    """gradient[sequence, :, position] += x [N, Hq, D], with the same bits on every run."""
    sequence, position = rows.places()
    if gradient.is_cuda:  # sorts, and adds rows of one place in their order
        gradient.transpose(1, 2).index_put_((sequence, position), x, accumulate=True)
        return
    first = kept(rows, (rows.position,), "first row of the place", lambda: _first(*rows.places()))
    summed = torch.zeros_like(x).index_add_(0, first, x)[first]
    at = gradient.transpose(1, 2)
    at[sequence, position] = at[sequence, position] + summed


def _first(sequence: Tensor, position: Tensor) -> Tensor:
    """int64 [N]: the first row that is taken from the same place."""
    same = (sequence[:, None] == sequence) & (position[:, None] == position)
    number = torch.arange(len(sequence), device=sequence.device)
    return torch.where(same, number, len(sequence)).amin(1) if len(sequence) else sequence


def _differentiable(
    shape: torch.Size, length: int, main: Tensor | None, present: list[tuple[QueryRows, Tensor]]
) -> Tensor:
    if main is None:
        gradient = present[0][1].new_zeros(shape)
    else:
        gradient = torch.nn.functional.pad(main, (0, 0, 0, shape[2] - length))
    for rows, x in present:
        at = gradient.transpose(1, 2).index_put(rows.places(), x, accumulate=True)
        gradient = at.transpose(1, 2)
    return gradient
