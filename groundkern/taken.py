"""Where the rows of all readings of a layer are: taken from its queries at once, and added to their
gradient at once (`groundkern.beside`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from groundkern import backends


class Selected(Protocol):
    """Rows of a layer, hashable."""

    def queries(self) -> tuple[Tensor, Tensor]:
        """Sequence and position [N] of their queries."""


Key = TypeVar("Key", bound=Selected)
Taken = dict[Any, Tensor]  # [N, ...] by selection


class Places:
    """Where the rows of several selections are, one selection after the other.

    Made once for all layers of a run that take the same rows: a later write to these changes
    nothing.

    Args:
        selections: distinct, of N rows in all.
        total: T, the tokens of each sequence; side tokens are the last.
        triton: whether the gradients are joined by a Triton kernel, and not by torch's.
    """

    def __init__(self, selections: Sequence[Selected], total: int, triton: bool = False) -> None:
        self.selections, self.total, self.join = selections, total, None
        if triton:
            from groundkern.taken_kernels import join

            self.join = join
        places = [rows.queries() for rows in selections]
        self.sizes = [len(sequence) for sequence, _ in places]
        self.sequence = torch.cat([sequence for sequence, _ in places]).long()
        self.position = torch.cat([position for _, position in places]).clamp(min=0).long()
        self.launches: dict[Any, Any] = {}  # of the Triton kernel
        self._zeros: dict[tuple, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def take(self, x: Tensor) -> Sequence[Tensor]:
        """[N, H, D] of x [B, H, T, D], or [N, H] of [B, H, T], of each selection."""
        shape, strides = x.shape, x.stride()
        of_batch, of_token = strides[0] if shape[0] > 1 else 0, strides[2]
        if type(x) is Tensor and of_token > 0 and of_batch % of_token == 0:
            # One index says where a row is: twice as fast as two, with a slice between.
            apart = of_batch // of_token  # sequences, in tokens
            tokens = (shape[0] - 1) * apart + shape[2]
            every = x.as_strided(
                (tokens, shape[1], *shape[3:]), (of_token, strides[1], *strides[3:])
            )
            taken = every.index_select(0, self._places(apart))
        else:
            taken = x[self.sequence, :, self.position]
        return (taken,) if len(self.sizes) == 1 else taken.split_with_sizes(self.sizes)

    def _places(self, apart: int) -> Tensor:
        """int64 [N], where sequences are so many tokens apart."""
        found = self._found.get(apart)
        if found is None:
            found = self._found[apart] = self.sequence * apart + self.position
        return found

    def taken(self, x: Tensor) -> Taken:
        """The same by selection."""
        return dict(zip(self.selections, self.take(x), strict=True))

    def whole(self, gradient: Tensor) -> Tensor:
        """[B, T, H, D], as projections lay it, of the first tokens' [B, H, S, D]; always new."""
        batch, heads, length, dim = gradient.shape
        shape = batch, self.total - length, heads, dim
        key = shape, gradient.dtype
        if key not in self._zeros:
            self._zeros[key] = gradient.new_zeros(shape)
        return torch.cat((gradient.transpose(1, 2), self._zeros[key]), 1)

    def add(self, gradient: Tensor, x: Tensor, plain: bool) -> Tensor:
        """gradient[sequence, position] += x, with the same bits on every run.

        Args:
            gradient: contiguous [B, T, H, D], which is written to if it is plain.
            x: [N, H, D].
            plain: both are neither batched nor differentiated again.
        """
        if not plain:
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

    def by_token(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """int32 [B * T + 1] and [N] of each selection: the first row of each token, among rows in
        this order."""
        token = torch.arange(batch * self.total + 1, device=self.sequence.device)
        found = []
        for places in (self.sequence * self.total + self.position).split(self.sizes):
            place, order = places.sort(stable=True)
            found.append((torch.searchsorted(place, token, out_int32=True), order.int()))
        return found


def joins_by_kernel(backend: str, q: Tensor, v: Tensor) -> bool:
    """Whether gradients of layers like this one are joined by the Triton kernel.

    Args:
        backend: of the ops.
        q, v: of any shape with their head dimensions last.
    """

    def unsupported(name: str) -> str | None:
        if name != "triton":
            return None
        from groundkern import tiles

        return tiles.unsupported(q, v)

    return backends.choose(backend, q.device, unsupported) == "triton"
