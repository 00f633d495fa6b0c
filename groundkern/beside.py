"""What a layer's main pass is given, and ops beside it: one node of the graph hands out both.

Autograd would give each selection of rows a gradient like the queries [B, Hq, T, D], full of zeros,
and each of query, key and value one more where side tokens are cut off. Here one node hands out the
main pass's tensors. Its backward is given all gradients and writes each [B, H, T, D] once: the main
pass's and what the ops have found, zeros for the side tokens, and the rows added where they are.
Without side tokens the main pass's gradient of the queries is copied, because Python cannot tell
that nobody else holds a gradient that autograd hands over.

The node runs the ops too if they are known before the main pass (`ask_beside`). If they are not,
because they use its log-sum-exp or its output, it hands out their rows, and the same keys and
values once more (`take_beside`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern import together
from groundkern.calls import Call, applied, is_direct
from groundkern.op_body import NOTHING, in_body
from groundkern.taken import Places, Taken
from groundkern.together import Asked, added


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


class OfRows(NamedTuple):
    """A call that is asked of layer after layer, without the layer's q, k and v."""

    number: int  # of the selection whose rows are its q
    op: Any  # as in `Asked`
    call: Call
    made: type[tuple]  # the op's `Inputs`
    reads_v: bool
    others: tuple[Tensor | None, ...]  # the inputs after v

    @classmethod
    def of(cls, number: int, asked: Asked) -> OfRows:
        """What was asked of one layer."""
        inputs = asked.inputs
        return cls(number, asked.op, asked.call, type(inputs), inputs.v is not None, inputs[3:])

    def given(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Call, Any]:
        """What to run in a layer."""
        return self.op, self.call, self.made(q, k, v if self.reads_v else None, *self.others)


def ask_beside(
    calls: Sequence[OfRows], places: Places, length: int, *tensors: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, ...]]]:
    """The main pass's queries, keys and values, and the differentiable results of each call.

    Args:
        calls: that need no dispatcher and whose own tensors, those after v, have no gradient.
        places: of their rows.
        length: as for `take_beside`.
        tensors: query, key and value, as there; the query requires a gradient.
    """
    found = applied(_AskBeside, calls, places, length, *tensors)
    if length == tensors[0].shape[2]:
        main, results = (found[0], *tensors[1:]), found[1:]
    else:
        main, results = found[:3], found[3:]
    answers = []
    for each in calls:
        count = each.op.RESULTS
        answers.append(results[:count])
        results = results[count:]
    return main, answers


def _first(x: Tensor, length: int) -> Tensor:
    """[B, H, S, D] of [B, H, T, D]."""
    if type(x) is not Tensor:
        return x.narrow(2, 0, length)
    return x.as_strided((*x.shape[:2], length, x.shape[3]), x.stride())  # twice as fast


def _mark(ctx: Any, tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """Views of tensors without a gradient have none."""
    if not all(x.requires_grad for x in tensors):
        pairs = zip(tensors, views, strict=True)
        ctx.mark_non_differentiable(*[y for x, y in pairs if not x.requires_grad])


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
            _mark(ctx, (*tensors, *tensors[1:]), first)
        ctx.shape = first[0].shape
        return *first, *places.take(tensors[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        others = 0 if ctx.count == 1 else 4
        dq, (dk, dv, own_dk, own_dv) = gradients[0], gradients[1 : others + 1] or (None,) * 4
        found = (dq, dk, dv), (own_dk, own_dv), gradients[others + 1 :]
        plain = not torch.is_grad_enabled() and is_direct(gradients)
        with in_body(ctx.places.sequence.device) if plain else NOTHING:
            return None, None, *_joined(ctx.places, *found, ctx.shape, plain)[: ctx.count]


class _AskBeside(Function):
    @staticmethod
    def forward(ctx: Any, calls: Sequence[OfRows], places: Places, length: int, *tensors: Tensor):
        """The main pass's queries or, to cut off side tokens, its queries, keys and values; and the
        results of the calls."""
        ctx.set_materialize_grads(False)
        query, k, v = tensors
        ctx.calls, ctx.places, ctx.alone = calls, places, length == query.shape[2]
        if ctx.alone:
            main = [query.view_as(query)]
        else:
            main = [_first(x, length) for x in tensors]
            _, k, v = main
            _mark(ctx, tensors, main)
        ctx.shape, rows = main[0].shape, places.take(query)
        given = [each.given(rows[each.number], k, v) for each in calls]
        with in_body(k.device):
            results, ctx.ran, saved = together.forward(given)
        v = v if any(each.reads_v for each in calls) else None
        ctx.save_for_backward(k, v, *rows, *saved)
        return *main, *results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        calls, places, shape = ctx.calls, ctx.places, ctx.shape
        k, v, *saved = ctx.saved_tensors  # once: checkpointing gives them out once
        count = len(places.sizes)
        rows, saved = saved[:count], saved[count:]
        if ctx.alone:
            main, above = (gradients[0], None, None), gradients[1:]
        else:
            main, above = gradients[:3], gradients[3:]
        again = torch.is_grad_enabled()
        if again:  # without a graph of their own the ops would not refuse a second derivative
            rows = [x.detach().requires_grad_() for x in rows]
        plain = not again and is_direct(gradients)
        with in_body(k.device) if plain else NOTHING:
            queries = [rows[each.number] for each in calls]
            dk, dv, found = together.backward(ctx.ran, queries, k, v, saved, above, plain)
            of_rows: list[Tensor | None] = [None] * count
            for each, (dq, *_) in zip(calls, found, strict=True):
                of_rows[each.number] = added(dq, of_rows[each.number], ours=plain)
            if ctx.alone:
                dq, *_ = _joined(places, main, (None, None), of_rows, shape, plain)
                return None, None, None, dq, dk, dv
            return None, None, None, *_joined(places, main, (dk, dv), of_rows, shape, plain)


def _joined(
    places: Places,
    main: Sequence[Tensor | None],
    beside: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    shape: torch.Size,
    plain: bool,
) -> list[Tensor | None]:
    """The gradients of query, key and value [B, H, T, D]; None for what has none.

    Args:
        main: those of the main pass's q, k and v [B, H, S, D].
        beside: those of the ops' k and v.
        rows: [N, Hq, D] of each selection.
        shape: [B, Hq, S, D], of q.
        plain: they are neither batched nor differentiated again.
    """
    if all(x is None for x in (*main, *beside, *rows)):
        return [None, None, None]
    if plain and places.join is not None:
        return places.join(places, main, beside, rows, shape)
    (dq, dk, dv), (own_dk, own_dv), of_rows = main, beside, _rows(rows, places, shape)
    if dq is None and of_rows is not None:
        dq = of_rows.new_zeros(shape)
    sums = dq, added(own_dk, dk, ours=False), added(own_dv, dv, ours=False)
    whole = [None if x is None else places.whole(x) for x in sums]
    if of_rows is not None:
        whole[0] = places.add(whole[0], of_rows, plain)
    return [None if x is None else x.transpose(1, 2) for x in whole]


def _rows(gradients: Sequence[Tensor | None], places: Places, shape: torch.Size) -> Tensor | None:
    """[N, Hq, D], the gradients of all selections; None if none has one."""
    if len(gradients) == 1 or all(x is None for x in gradients):
        return gradients[0]
    like = next(x for x in gradients if x is not None)
    sizes = zip(gradients, places.sizes, strict=True)
    return torch.cat([like.new_zeros(n, shape[1], shape[3]) if x is None else x for x, n in sizes])
