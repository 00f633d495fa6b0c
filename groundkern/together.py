"""Attention ops of one layer as one node of the graph.

A plain eager call goes to the kernels through an autograd function, without torch's dispatcher,
which torch.compile, tensor subclasses and transforms need. Ops that read the same keys share one
such function: each adds what it finds for the keys to what the others found, so that autograd is
handed one gradient of k and one of v. `python -m benchmarks.host` measures what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern import checks
from groundkern.calls import Call, is_direct
from groundkern.op_body import NOTHING, in_body


class Asked(NamedTuple):
    """A call of an op with its tensors of a layer."""

    op: Any  # the module `op` of the op's folder
    call: Call
    inputs: Any  # the op's `Inputs`, which begin with q, k and v
    direct: bool  # whether it needs no dispatcher


class _Part(NamedTuple):
    """A call, without its tensors."""

    op: Any
    call: Call
    versions: tuple[int, ...] | None  # of the selection
    inputs: type  # `Inputs`
    reads_v: bool
    saved: int  # how many tensors of its own the backward reads besides inputs


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
        results = _Together.apply(calls, calls[0].inputs.k, values[0] if values else None, *beside)
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
        saved, results, parts = [k, v, *beside], [], []
        with in_body(k.device):
            for op, call, inputs, _ in asked:
                outputs = op.kernels(call.backend).forward(inputs, call)
                own = op.saved(outputs)
                results += outputs[: op.RESULTS]
                saved += own
                reads_v = inputs.v is not None
                parts.append(
                    _Part(op, call, call.versions(), type(inputs), reads_v, len(own))
                )
        ctx.parts = parts
        ctx.save_for_backward(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, *rest = ctx.saved_tensors  # once: checkpointing gives them out once
        plain = not torch.is_grad_enabled() and is_direct(above)
        widths = [len(part.inputs._fields) - 2 for part in ctx.parts]
        beside, own = rest[: sum(widths)], rest[sum(widths) :]
        dk = dv = None
        gradients: list[Tensor | None] = []
        with in_body(k.device) if plain else NOTHING:
            for part, width in zip(ctx.parts, widths):
                op, upstream = part.op, above[: part.op.RESULTS]
                of_inputs, saved = beside[:width], own[: part.saved]
                above = above[op.RESULTS :]
                beside, own = beside[width:], own[part.saved :]
                if all([x is None for x in upstream]):
                    gradients += [None] * width
                    continue
                _refuse_written(part)
                values = v if part.reads_v else None
                inputs = part.inputs(of_inputs[0], k, values, *of_inputs[1:])
                gradient = op.backward if plain else op.dispatched_backward
                dq, dk, dv, *others = gradient(upstream, inputs, saved, part.call, dk, dv)
                gradients += [dq, *others]
        return None, dk, dv, *gradients


def _refuse_written(part: _Part) -> None:
    """Raise, as autograd raises for what it saves, if rows, sets or columns were written to."""
    if part.versions != part.call.versions():
        wanted = "rows, key sets and columns that nothing is written to before the backward"
        checks.fail("rows", wanted, "ones changed by an inplace operation", RuntimeError)


def added(found: Tensor | None, before: Tensor | None) -> Tensor | None:
    """The sum of two gradients of one tensor; `before` belongs to us and may be written to."""
    if found is None or before is None:
        return before if found is None else found
    return found + before if torch.is_grad_enabled() else before.add_(found)
