"""The rows of all readings of a layer, taken from its queries at once, with one gradient for both.

Autograd would give each selection of rows a gradient like the queries [B, Hq, T, D], full of zeros,
and each of query, key and value one more where side tokens are cut off. Here one node hands out the
main pass's tensors, the same keys and values once more for ops beside it, and the rows of the
queries. So its backward is given all their gradients and writes each [B, H, T, D] once: the main
pass's and what the ops have found, zeros for the side tokens, and the rows added where they are.
Without side tokens the main pass's gradient of the queries is copied, because Python cannot tell
that nobody else holds a gradient that autograd hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern import backends
from groundkern.calls import applied, is_direct
from groundkern.op_body import in_body
from groundkern.together import added


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


class Beside(NamedTuple):
    """A layer's tensors for the main pass, and for ops beside it."""

    q: Tensor  # [B, Hq, S, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    own_k: Tensor  # of the ops: the same values
    own_v: Tensor
    taken: Taken  # [N, Hq, D] of `q`


def take_beside(
    query: Tensor, key: Tensor, value: Tensor, length: int, places: Places | None
) -> Beside:
    """The queries, keys and values of the main pass, and the queries of rows.

    Args:
        query, key, value: [B, H, T, D] of all tokens, with their own H and D.
        length: S, of the main pass; what follows are side tokens.
        places: of the rows; None: there are none.
    """
    alone = length == query.shape[2]
    if places is None or not (torch.is_grad_enabled() and query.requires_grad):
        taken = {} if places is None else places.taken(query)
        if not alone:
            query, key, value = (x[:, :, :length] for x in (query, key, value))
        return Beside(query, key, value, key, value, taken)
    own_key, own_value = key, value
    if alone:
        query, *rows = applied(_TakeBeside, places, length, query)
    else:
        found = applied(_TakeBeside, places, length, query, key, value)
        query, key, value, own_key, own_value, *rows = found
    taken = dict(zip(places.selections, rows, strict=True))
    return Beside(query, key, value, own_key, own_value, taken)


def _first(x: Tensor, length: int) -> Tensor:
    """[B, H, S, D] of [B, H, T, D]."""
    if type(x) is not Tensor:
        return x.narrow(2, 0, length)
    return x.as_strided((*x.shape[:2], length, x.shape[3]), x.stride())  # twice as fast


class _TakeBeside(Function):
    @staticmethod
    def forward(ctx: Any, places: Places, length: int, *tensors: Tensor):
        """Of the queries or, to cut off side tokens, of the queries, keys and values."""
        ctx.set_materialize_grads(False)
        ctx.places, ctx.count = places, len(tensors)
        if len(tensors) == 1:
            first = [tensors[0].view_as(tensors[0])]
        else:
            q, k, v = [_first(x, length) for x in tensors]
            first = [q, k, v, k.view_as(k), v.view_as(v)]
            if not all(x.requires_grad for x in tensors):
                pairs = zip((*tensors, *tensors[1:]), first, strict=True)
                ctx.mark_non_differentiable(*[y for x, y in pairs if not x.requires_grad])
        ctx.shape = first[0].shape
        return *first, *places.take(tensors[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        places, others = ctx.places, 0 if ctx.count == 1 else 4
        dq, (dk, dv, own_dk, own_dv) = gradients[0], gradients[1 : others + 1] or (None,) * 4
        of_rows = gradients[others + 1 :]
        plain = not torch.is_grad_enabled() and is_direct(gradients)
        if plain and places.join is not None:
            with in_body(next(x for x in gradients if x is not None).device):
                found = places.join(places, (dq, dk, dv), (own_dk, own_dv), of_rows, ctx.shape)
            return None, None, *found[: ctx.count]
        rows = _rows(of_rows, places, ctx.shape)
        if dq is None and rows is not None:
            dq = rows.new_zeros(ctx.shape)
        sums = dq, added(own_dk, dk, ours=False), added(own_dv, dv, ours=False)
        whole = [None if x is None else places.whole(x) for x in sums]
        if rows is not None:
            whole[0] = places.add(whole[0], rows)
        found = [None if x is None else x.transpose(1, 2) for x in whole]
        return None, None, *found[: ctx.count]


def _rows(gradients: Sequence[Tensor | None], places: Places, shape: torch.Size) -> Tensor | None:
    """[N, Hq, D], the gradients of all selections; None if none has one."""
    if len(gradients) == 1 or all(x is None for x in gradients):
        return gradients[0]
    like = next(x for x in gradients if x is not None)
    sizes = zip(gradients, places.sizes, strict=True)
    return torch.cat([like.new_zeros(n, shape[1], shape[3]) if x is None else x for x, n in sizes])
