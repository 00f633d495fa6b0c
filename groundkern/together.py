"""Attention ops of one layer as one node of the graph.

A plain eager call goes to the kernels through an autograd function, without torch's dispatcher,
which torch.compile, tensor subclasses and transforms need. Ops that read the same keys share one
such function: each adds what it finds for the keys to what the others found, so that autograd is
handed one gradient of k and one of v. `python -m benchmarks.host` measures what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern.calls import Call, applied, is_direct, signature
from groundkern.op_body import NOTHING, in_body


class Asked(NamedTuple):
    """A call of an op with its tensors of a layer."""

    op: Any  # the module `op` of the op's folder
    call: Call
    inputs: Any  # the op's `Inputs`, which begin with q, k and v
    direct: bool  # whether it needs no dispatcher


class Repeated:
    """A call that is asked for in layer after layer, with tensors of the layer.

    What it found for one layer serves all whose tensors differ in their numbers alone. So it is for
    one step's rows, sets, columns and targets, which nothing is written to meanwhile.
    """

    def __init__(self) -> None:
        # (options, signature, call without tensors of a layer): a few, compared one by one because
        # hashing them takes longer
        self._known: list[tuple[Any, tuple, Asked]] = []

    def __call__(
        self, options: Any, tensors: dict[str, Tensor | None], make: Callable[[], Asked]
    ) -> Asked:
        """What `make` asks for, checked if nothing like it has been asked for before.

        Args:
            options: what the call depends on besides.
            tensors: of the layer, by the names of the op's `Inputs`.
            make: without arguments; is given these tensors.
        """
        given = tensors.values()
        if not is_direct(given):
            return make()
        signed = signature(given)
        for asked_with, of, known in self._known:
            if of == signed and asked_with == options:
                return known._replace(inputs=known.inputs._replace(**tensors))
        found = make()
        as_given = all(getattr(found.inputs, name) is x for name, x in tensors.items())
        if found.direct and as_given:  # autocast may have cast them
            nothing = found.inputs._replace(**dict.fromkeys(tensors))
            self._known.append((options, signed, found._replace(inputs=nothing)))
        return found


def run(asked: Sequence[Asked]) -> list[tuple[Tensor, ...]]:
    """The differentiable results of each call.

    Those that need no dispatcher and read the same k, and the same v or none, are one node.
    """
    found: list[tuple[Tensor, ...]] = [()] * len(asked)
    for members in _groups(asked):
        calls = [asked[i] for i in members]
        if not calls[0].direct:
            found[members[0]] = calls[0].op.dispatched(calls[0].inputs, calls[0].call)
            continue
        values = [x.inputs.v for x in calls if x.inputs.v is not None]
        beside = [x for each in calls for x in (each.inputs[0], *each.inputs[3:])]
        results = applied(
            _Together, calls, calls[0].inputs.k, values[0] if values else None, *beside
        )
        for i, each in zip(members, calls):
            found[i], results = results[: each.op.RESULTS], results[each.op.RESULTS :]
    return found


def _groups(asked: Sequence[Asked]) -> list[list[int]]:
    """The numbers of those that run together, in the order in which they were asked."""
    groups: list[list[int]] = []
    shared: dict[int, tuple[list[int], Tensor | None]] = {}  # by k
    for number, each in enumerate(asked):
        group, v = shared.get(id(each.inputs.k), (None, None))
        own = each.inputs.v
        if not each.direct or group is None or not (v is None or own is None or own is v):
            group = [number]
            groups.append(group)
        else:
            group.append(number)
        if each.direct:
            shared[id(each.inputs.k)] = group, own if v is None else v
    return groups


class Ran(NamedTuple):
    """What the backward of a call needs besides tensors."""

    op: Any
    call: Call
    made: type[tuple]  # the op's `Inputs`
    reads_v: bool
    others: int  # tensors of `made` after v
    outputs: int  # tensors that the forward left


def forward(
    asked: Iterable[tuple[Any, Call, Any]],
) -> tuple[tuple[Tensor, ...], list[Ran], list[Tensor | None]]:
    """The results of all calls, what ran, and what their backward reads besides q, k and v.

    Args:
        asked: op, call and inputs of each, as in `Asked`.
    """
    results: tuple[Tensor, ...] = ()
    ran, saved = [], []
    for op, call, inputs in asked:
        outputs = op.kernels(call.backend).forward(inputs, call)
        others, own = inputs[3:], op.saved(outputs)
        ran.append(Ran(op, call, type(inputs), inputs.v is not None, len(others), len(own)))
        saved += (*others, *own)
        results += outputs[: op.RESULTS]
    return results, ran, saved


def backward(
    ran: Sequence[Ran],
    queries: Sequence[Tensor],
    k: Tensor,
    v: Tensor | None,
    saved: Sequence[Tensor | None],
    above: Sequence[Tensor | None],
    plain: bool,
) -> tuple[Tensor | None, Tensor | None, list[tuple[Tensor | None, ...]]]:
    """The gradients of k and v, and for each call those of its q and of its inputs after v.

    Args:
        queries: q of each call.
        saved: as the forward gave it.
        above: gradients of all results, or None.
        plain: they are neither batched nor differentiated again.
    """
    dk = dv = None
    gradients: list[tuple[Tensor | None, ...]] = []
    for (op, call, made, reads_v, others, outputs), q in zip(ran, queries, strict=True):
        upstream, above = above[: op.RESULTS], above[op.RESULTS :]
        end = others + outputs
        beside, left, saved = saved[:others], saved[others:end], saved[end:]
        if all(x is None for x in upstream):
            gradients.append((None,) * (others + 1))
            continue
        call.refuse_written()
        inputs = made(q, k, v if reads_v else None, *beside)
        gradient = op.backward if plain else op.dispatched_backward
        dq, dk, dv, *found = gradient(upstream, inputs, left, call, dk, dv)
        gradients.append((dq, *found))
    return dk, dv, gradients


class _Together(Function):
    @staticmethod
    def forward(
        ctx: Any,
        asked: Sequence[Asked],
        k: Tensor,
        v: Tensor | None,
        *beside: Tensor | None,  # q of each, and its inputs after v
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with in_body(k.device):
            results, ctx.ran, saved = forward([each[:3] for each in asked])
        ctx.save_for_backward(k, v, *[each.inputs.q for each in asked], *saved)
        return results

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, *saved = ctx.saved_tensors  # once: checkpointing gives them out once
        plain = not torch.is_grad_enabled() and is_direct(above)
        count = len(ctx.ran)
        with in_body(k.device) if plain else NOTHING:
            dk, dv, gradients = backward(ctx.ran, saved[:count], k, v, saved[count:], above, plain)
        return None, dk, dv, *[x for each in gradients for x in each]


def added(found: Tensor | None, before: Tensor | None, *, ours: bool = True) -> Tensor | None:
    """The sum of two gradients of one tensor.

    Args:
        ours: `before` is written to; not where gradients are batched or differentiated again.
    """
    if found is None or before is None:
        return before if found is None else found
    return before.add_(found) if ours else found + before
