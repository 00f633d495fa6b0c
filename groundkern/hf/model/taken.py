"""The rows of all readings of a layer, taken from its queries at once, with one gradient for both.

Autograd would give each selection of rows a gradient like the queries [B, Hq, T, D], full of zeros,
and each of query, key and value one more where side tokens are cut off. Here one node hands out the
main pass's tensors and the rows of the queries, so that its backward is given all their gradients
and writes each [B, H, T, D] once: the main pass's, zeros for the side tokens, and the rows added
where they are. Without side tokens the main pass's gradient is copied, because Python cannot tell
that nobody else holds a gradient that autograd hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from groundkern.hf.model.rows import Rows

Taken = dict[Rows, Tensor]  # [N, ...]


class Places:
    """Where the rows of several selections are, one selection after the other.

    Made once for all layers of a run that take the same rows: a later write to these changes
    nothing.

    Args:
        selections: distinct, of N rows in all.
        total: T, the tokens of each sequence; side tokens are the last.
    """

    def __init__(self, selections: Sequence[Rows], total: int) -> None:
        self.selections, self.total = selections, total
        places = [rows.queries() for rows in selections]
        self._sizes = [len(sequence) for sequence, _ in places]
        self.sequence = torch.cat([sequence for sequence, _ in places]).long()
        self.position = torch.cat([position for _, position in places]).clamp(min=0).long()
        self._zeros: dict[tuple, Tensor] = {}

    def take(self, x: Tensor) -> Tensor:
        """[N, H, D] of x [B, H, T, D], or [N, H] of [B, H, T]."""
        return x[self.sequence, :, self.position]

    def split(self, x: Tensor) -> Taken:
        """What was taken, by selection."""
        parts = [x] if len(self._sizes) == 1 else x.split_with_sizes(self._sizes)
        return dict(zip(self.selections, parts, strict=True))

    def whole(self, gradient: Tensor) -> Tensor:
        """[B, T, H, D], as projections lay it, of the first tokens' [B, H, S, D]; always new."""
        batch, heads, length, dim = gradient.shape
        shape = batch, self.total - length, heads, dim
        key = shape, gradient.dtype
        if key not in self._zeros:
            self._zeros[key] = gradient.new_zeros(shape)
        return torch.cat((gradient.transpose(1, 2), self._zeros[key]), 1)

    def add(self, gradient: Tensor, x: Tensor) -> Tensor:
        """gradient[sequence, position] += x, with the same bits on every run.

        Args:
            gradient: contiguous [B, T, H, D], which is written to, unless it is to be
                differentiated again.
            x: [N, H, D].
        """
        if torch.is_grad_enabled():
            return gradient.index_put((self.sequence, self.position), x, accumulate=True)
        order, bags, place = self._sums
        sums = torch.embedding_bag(x.flatten(1), order, bags)[0]
        gradient.view(-1, sums.shape[1]).index_add_(0, place, sums)
        return gradient

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bags of rows of one place: int64 [N] rows, in the order of their places, the first of
        each bag, and the bag's place among B x T.

        A place has one bag and, for each further row of the place, an empty one: on CUDA
        `index_add_` adds in any order, and here at most one of the things it adds is not 0.
        """
        place, order = (self.sequence * self.total + self.position).sort(stable=True)
        first, end = (torch.searchsorted(place, place, right=right) for right in (False, True))
        number = torch.arange(len(place), device=place.device)
        return order, torch.where(first == number, number, end), place


def take_beside(
    query: Tensor, key: Tensor, value: Tensor, length: int, places: Places | None
) -> tuple[Tensor, Tensor, Tensor, Taken]:
    """The queries, keys and values of the main pass, and the queries of rows.

    Args:
        query, key, value: [B, H, T, D] of all tokens, with their own H and D.
        length: S, of the main pass; what follows are side tokens.
        places: of the rows; None: there are none.

    Returns:
        Three [B, H, S, D], and [N, Hq, D] of each selection.
    """
    alone = length == query.shape[2]
    if places is None or not (torch.is_grad_enabled() and query.requires_grad):
        taken = {} if places is None else places.split(places.take(query))
        tensors = query, key, value
        return *(tensors if alone else [x[:, :, :length] for x in tensors]), taken
    if alone:
        taken, q = _TakeBeside.apply(places, length, query)
        return q, key, value, places.split(taken)
    taken, *tensors = _TakeBeside.apply(places, length, query, key, value)
    return *tensors, places.split(taken)


class _TakeBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, places: Places, length: int, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        ctx.places = places
        first = [x[:, :, :length] for x in tensors]
        ctx.mark_non_differentiable(
            *(y for x, y in zip(tensors, first, strict=True) if not x.requires_grad)
        )
        ctx.shape = first[0].shape
        return places.take(tensors[0]), *first

    @staticmethod
    def backward(ctx, taken: Tensor | None, *first: Tensor | None):
        places = ctx.places
        if taken is not None and first[0] is None:
            first = taken.new_zeros(ctx.shape), *first[1:]
        whole = [None if x is None else places.whole(x) for x in first]
        if taken is not None:
            whole[0] = places.add(whole[0], taken)
        return None, None, *(None if x is None else x.transpose(1, 2) for x in whole)
