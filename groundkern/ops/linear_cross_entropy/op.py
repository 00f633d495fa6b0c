"""`groundkern::linear_cross_entropy` and its backward: opaque to torch.compile, one implementation
per backend.

`linear_cross_entropy_with_gradients` computes the gradients in the forward, from the same logits;
its backward only scales them. For that the upstream gradients must be known up to a factor: of the
loss alone, one for all rows, or with a frozen head one per row.

`linear_cross_entropy` computes them in its backward, from recomputed logits, or from those that the
forward saved: `save`, for a backend that `saves_logits`.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.head_gradients import fakes, present, scaled
from groundkern.op_body import grouped, op_body, regroup, schema
from groundkern.ops.linear_cross_entropy import (
    Ahead,
    Head,
    Inputs,
    Labels,
    Options,
    Rows,
    Upstream,
)
from groundkern.precision import accumulation_dtype


class _Forward(NamedTuple):
    weight_grad: Tensor | None  # for the backward
    save: bool


class _Saved(NamedTuple):
    logits: Tensor  # uint8, what the forward saved of them; empty: nothing
    train_weight: bool


def kernels(backend: str):
    """The module that implements a backend.

    It has `forward` and `backward`, `forward_with_gradients` if `gradients_in_forward`, and
    `forward_saving` if `saves_logits`.
    """
    match backend:
        case "native":
            from groundkern.ops.linear_cross_entropy import native_kernels as module
        case "triton":
            from groundkern.ops.linear_cross_entropy import triton_launch as module
        case _:
            from groundkern.ops.linear_cross_entropy import reference as module
    return module


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


@custom_op(
    "groundkern::linear_cross_entropy",
    mutates_args=(),
    schema=f"({schema(Inputs, Labels, Options, _Forward)}, str backend) -> {_tensors(8)}",
)
@op_body(Inputs, Labels, Options, _Forward)
def linear_cross_entropy(inputs, labels, options, how, backend) -> tuple[Tensor, ...]:
    """The fields of `Rows`, and what was saved of the logits."""
    if how.save:
        rows, saved = kernels(backend).forward_saving(inputs, labels, options)
    else:
        rows = kernels(backend).forward(inputs, labels, options)
        saved = _nothing_saved(inputs.hidden)
    return *present(rows, inputs.hidden), saved


@linear_cross_entropy.register_fake
@grouped(Inputs, Labels, Options, _Forward)
def _(inputs, labels, options, how, backend):
    hidden = inputs.hidden
    size = kernels(backend).saved_bytes(inputs, options) if how.save else 0
    saved = hidden.new_empty(size, dtype=torch.uint8)
    return *_fake_rows(inputs, labels, options), saved


def _fake_rows(inputs: Inputs, labels: Labels, options: Options) -> tuple[Tensor, ...]:
    count, top = labels.target.shape[0], options.top_k
    floats = partial(inputs.hidden.new_empty, dtype=_wide(inputs.hidden))
    ids = labels.target.new_empty
    rows = Rows(
        *(floats(count) for _ in range(3)),
        floats(count) if options.entropy else None,
        ids(count),
        ids(count, top) if top > 0 else None,
        floats(count, top) if top > 0 else None,
    )
    return present(rows, inputs.hidden)


def _wide(x: Tensor) -> torch.dtype:
    return accumulation_dtype(x.dtype)


def _nothing_saved(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


@custom_op(
    "groundkern::linear_cross_entropy_backward",
    mutates_args=("weight_grad",),
    schema=(
        f"({schema(Upstream, Inputs, Labels, Options, _Saved)}, Tensor(a!)? weight_grad, "
        f"str backend) -> {_tensors(3)}"
    ),
)
@op_body(Upstream, Inputs, Labels, Options, _Saved)
def linear_cross_entropy_backward(
    upstream, inputs, labels, options, saved, weight_grad, backend
) -> tuple[Tensor, ...]:
    arguments = (upstream, inputs, labels, options, Head(saved.train_weight, weight_grad))
    known = {"saved": saved.logits} if saved.logits.numel() > 0 else {}
    gradients = kernels(backend).backward(*arguments, **known)
    return present(gradients, inputs.hidden)


@linear_cross_entropy_backward.register_fake
@grouped(Upstream, Inputs, Labels, Options, _Saved)
def _(upstream, inputs, labels, options, saved, weight_grad, backend):
    return fakes(*inputs, saved.train_weight and weight_grad is None)


def _setup_context(ctx, inputs, output) -> None:
    inputs, labels, ctx.options, how, ctx.backend = regroup(
        inputs, Inputs, Labels, Options, _Forward
    )
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*inputs, *labels, output[-1])
    ctx.set_materialize_grads(False)  # no zeros as large as what was saved
    ctx.weight_grad = how.weight_grad


def _backward(ctx, *upstream: Tensor | None):
    (*saved, logits), train_weight = ctx.saved_tensors, ctx.needs_input_grad[1]
    hidden, _, bias, target, *_ = saved
    none = target.new_zeros(target.shape, dtype=_wide(hidden))
    above = [none if x is None else x.contiguous() for x in upstream[:4]]
    if not ctx.options.entropy:
        above[3] = None
    dhidden, dweight, dbias = linear_cross_entropy_backward(
        *above,
        *saved,
        *ctx.options,
        *_Saved(logits, train_weight),
        ctx.weight_grad,
        ctx.backend,
    )
    returned = train_weight and ctx.weight_grad is None
    gradients = dhidden, dweight if returned else None, None if bias is None else dbias
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 3)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def saves_logits(backend: str, inputs: Inputs, options: Options) -> bool:
    """Whether the forward can save what lets the backward do without the logits' product."""
    return backend == "native" and kernels(backend).saves_logits(inputs, options)


def gradients_in_forward(backend: str) -> bool:
    """Whether `linear_cross_entropy_with_gradients` exists for a backend: the reference gets its
    gradients from autograd, in the backward."""
    return backend != "reference"


@custom_op(
    "groundkern::linear_cross_entropy_with_gradients",
    mutates_args=(),
    schema=f"({schema(Inputs, Labels, Options, Ahead)}, str backend) -> {_tensors(10)}",
)
@op_body(Inputs, Labels, Options, Ahead)
def linear_cross_entropy_with_gradients(
    inputs, labels, options, ahead, backend
) -> tuple[Tensor, ...]:
    """The fields of `Rows`, where the loss is a scalar with row_factor, and those of `Gradients`:
    of that loss, or per row of each row's own."""
    rows, gradients = kernels(backend).forward_with_gradients(inputs, labels, options, ahead)
    return present((*rows, *gradients), inputs.hidden)


@linear_cross_entropy_with_gradients.register_fake
@grouped(Inputs, Labels, Options, Ahead)
def _(inputs, labels, options, ahead, backend):
    loss, *rest = _fake_rows(inputs, labels, options)
    if ahead.row_factor is not None:
        loss = loss.new_empty(())
    return loss, *rest, *fakes(*inputs, ahead.train_weight)


def _store_gradients(ctx, inputs, output) -> None:
    inputs, labels, ctx.options, ahead, ctx.backend = regroup(
        inputs, Inputs, Labels, Options, Ahead
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in dweight's shape for outputs nobody uses
    ctx.gradients = output[7:]
    ctx.save_for_backward(*inputs, *labels, ahead.row_factor)
    ctx.train_weight = ahead.train_weight


def _scale_gradients(ctx, dloss: Tensor, *_):
    """Return the stored gradients once. A second backward, and one that is to be differentiated
    again (which is refused), recomputes them."""
    train_weight, train_bias = ctx.train_weight, ctx.needs_input_grad[2]
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None or torch.is_grad_enabled():
        *tensors, row_factor = ctx.saved_tensors
        rows = dloss.contiguous() if row_factor is None else dloss * row_factor
        none = torch.zeros_like(rows)
        upstream = Upstream(rows, none, none, none if ctx.options.entropy else None)
        saved = _Saved(_nothing_saved(rows), train_weight)
        gradients = linear_cross_entropy_backward(
            *upstream, *tensors, *ctx.options, *saved, None, ctx.backend
        )
    else:
        used = (True, train_weight, train_bias)
        product = kernels(ctx.backend).scaled
        pairs = zip(gradients, used, strict=True)
        gradients = [scaled(x, dloss, product) if y else x for x, y in pairs]
    dhidden, dweight, dbias = gradients
    returned = dhidden, dweight if train_weight else None, dbias if train_bias else None
    return *returned, *[None] * (len(ctx.needs_input_grad) - 3)


linear_cross_entropy_with_gradients.register_autograd(
    _scale_gradients, setup_context=_store_gradients
)
