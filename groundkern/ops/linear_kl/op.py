"""`groundkern::linear_kl` and its backward: opaque to torch.compile, one implementation per
backend.

`linear_kl_with_gradients` computes the gradients in the forward, from the same logits; its backward
only scales them. For that the upstream gradient must be known up to a factor: one for all rows, or
with a frozen head one per row. `linear_kl` computes them in its backward, from recomputed logits.

The teacher is a constant: nothing comes back for its tensors. An absent gradient travels as an
empty tensor, because an op's outputs cannot be None.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.head_gradients import fakes, present, scaled
from groundkern.op_body import grouped, op_body, regroup, schema
from groundkern.ops.linear_kl import Ahead, Inputs, Options, Rows, Upstream
from groundkern.precision import accumulation_dtype


class _Trained(NamedTuple):
    train_weight: bool


def kernels(backend: str):
    """The module that implements a backend.

    It has `forward` and `backward`, and `forward_with_gradients` if `gradients_in_forward`.
    """
    match backend:
        case "native":
            from groundkern.ops.linear_kl import native_kernels as module
        case "triton":
            from groundkern.ops.linear_kl import triton_launch as module
        case _:
            from groundkern.ops.linear_kl import reference as module
    return module


@custom_op(
    "groundkern::linear_kl",
    mutates_args=(),
    schema=f"({schema(Inputs, Rows, Options)}, str backend) -> Tensor",
)
@op_body(Inputs, Rows, Options)
def linear_kl(inputs, rows, options, backend) -> Tensor:
    """Loss [N]."""
    return kernels(backend).forward(inputs, rows, options)


@linear_kl.register_fake
@grouped(Inputs, Rows, Options)
def _(inputs, rows, options, backend):
    return _losses(inputs.hidden)


def _losses(hidden: Tensor, *shape: int) -> Tensor:
    return hidden.new_empty(shape or hidden.shape[:1], dtype=accumulation_dtype(hidden.dtype))


@custom_op(
    "groundkern::linear_kl_backward",
    mutates_args=(),
    schema=(
        f"({schema(Upstream, Inputs, Rows, Options, _Trained)}, str backend) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
@op_body(Upstream, Inputs, Rows, Options, _Trained)
def linear_kl_backward(upstream, inputs, rows, options, trained, backend) -> tuple[Tensor, ...]:
    arguments = (upstream, inputs, rows, options, trained.train_weight)
    gradients = kernels(backend).backward(*arguments)
    return present(gradients, inputs.hidden)


@linear_kl_backward.register_fake
@grouped(Upstream, Inputs, Rows, Options, _Trained)
def _(upstream, inputs, rows, options, trained, backend):
    return fakes(*inputs[:3], trained.train_weight)


def _setup_context(ctx, inputs, output) -> None:
    inputs, rows, ctx.options, ctx.backend = regroup(inputs, Inputs, Rows, Options)
    ctx.save_for_backward(*inputs, *rows)


def _backward(ctx, dloss: Tensor):
    saved, train_weight = ctx.saved_tensors, ctx.needs_input_grad[1]
    gradients = linear_kl_backward(
        dloss.contiguous(), *saved, *ctx.options, train_weight, ctx.backend
    )
    return _returned(ctx, gradients, train_weight)


def _returned(ctx, gradients: tuple[Tensor, ...], train_weight: bool) -> tuple[Tensor | None, ...]:
    """One for each argument of the forward; None for those without."""
    dhidden, dweight, dbias = gradients
    train_bias = ctx.needs_input_grad[2]
    returned = dhidden, dweight if train_weight else None, dbias if train_bias else None
    return *returned, *[None] * (len(ctx.needs_input_grad) - 3)


linear_kl.register_autograd(_backward, setup_context=_setup_context)


def gradients_in_forward(backend: str) -> bool:
    """Whether `linear_kl_with_gradients` exists for a backend: the reference gets its gradients
    from autograd, in the backward."""
    return backend != "reference"


@custom_op(
    "groundkern::linear_kl_with_gradients",
    mutates_args=(),
    schema=(
        f"({schema(Inputs, Rows, Options, Ahead)}, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
@op_body(Inputs, Rows, Options, Ahead)
def linear_kl_with_gradients(inputs, rows, options, ahead, backend) -> tuple[Tensor, ...]:
    """The loss, a scalar with row_factor and [N] without, and the fields of `Gradients`: of that
    loss, or per row of each row's own."""
    loss, gradients = kernels(backend).forward_with_gradients(inputs, rows, options, ahead)
    return loss, *present(gradients, inputs.hidden)


@linear_kl_with_gradients.register_fake
@grouped(Inputs, Rows, Options, Ahead)
def _(inputs, rows, options, ahead, backend):
    loss = _losses(inputs.hidden)
    if ahead.row_factor is not None:
        loss = loss.new_empty(())
    return loss, *fakes(*inputs[:3], ahead.train_weight)


def _store_gradients(ctx, inputs, output) -> None:
    inputs, rows, ctx.options, ahead, ctx.backend = regroup(inputs, Inputs, Rows, Options, Ahead)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in dweight's shape for outputs nobody uses
    ctx.gradients = output[1:]
    ctx.save_for_backward(*inputs, *rows, ahead.row_factor)
    ctx.train_weight = ahead.train_weight


def _scale_gradients(ctx, dloss: Tensor, *_):
    """Return the stored gradients once. A second backward, and one that is to be differentiated
    again (which is refused), recomputes them."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None or torch.is_grad_enabled():
        *tensors, row_factor = ctx.saved_tensors
        each = dloss.contiguous() if row_factor is None else dloss * row_factor
        gradients = linear_kl_backward(each, *tensors, *ctx.options, ctx.train_weight, ctx.backend)
    else:
        used = (True, ctx.train_weight, ctx.needs_input_grad[2])
        pairs = zip(gradients, used, strict=True)
        product = kernels(ctx.backend).scaled
        gradients = [scaled(x, dloss, product) if y else x for x, y in pairs]
    return _returned(ctx, gradients, ctx.train_weight)


linear_kl_with_gradients.register_autograd(_scale_gradients, setup_context=_store_gradients)
