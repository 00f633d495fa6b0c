"""`groundkern::linear_cross_entropy` and its backward: opaque to torch.compile, one implementation
per backend.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.precision import accumulation_dtype, without_autocast


def kernels(backend: str):
    """The module that implements `forward` and `backward` for a backend."""
    match backend:
        case "native":
            from groundkern.ops.linear_cross_entropy import native_kernels as module
        case "triton":
            from groundkern.ops.linear_cross_entropy import triton_kernels as module
        case _:
            from groundkern.ops.linear_cross_entropy import reference as module
    return module


@custom_op("groundkern::linear_cross_entropy", mutates_args=())
@without_autocast
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    weight_grad: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: loss, log p(target), lse, likeliest id; `weight_grad` is for the backward."""
    bags = (ids, offsets, bag_index)
    return kernels(backend).forward(
        hidden, weight, bias, target, *bags, smoothing, ignore_index, softcap, group
    )


@linear_cross_entropy.register_fake
def _(hidden, weight, bias, target, *_):
    wide = accumulation_dtype(hidden.dtype)
    rows = [hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3)]
    return *rows, target.new_empty(target.shape)


@custom_op("groundkern::linear_cross_entropy_backward", mutates_args=("weight_grad",))
@without_autocast
def linear_cross_entropy_backward(
    dloss: Tensor,
    dlog_prob: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
    train_weight: bool,
    weight_grad: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bags = (ids, offsets, bag_index)
    options = (smoothing, ignore_index, softcap, group, train_weight, weight_grad)
    gradients = kernels(backend).backward(
        dloss, dlog_prob, dlse, hidden, weight, bias, target, *bags, *options
    )
    return tuple(hidden.new_empty(0) if x is None else x for x in gradients)


@linear_cross_entropy_backward.register_fake
def _(dloss, dlog_prob, dlse, hidden, weight, bias, *rest):
    *_, train_weight, weight_grad, _ = rest
    returned = train_weight and weight_grad is None
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        weight.new_empty(weight.shape) if returned else hidden.new_empty(0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, weight_grad, smoothing, ignore_index, softcap, group, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.weight_grad = weight_grad
    ctx.options = (smoothing, ignore_index, softcap, group)
    ctx.backend = backend


def _backward(ctx, dloss: Tensor, dlog_prob: Tensor, dlse: Tensor, _):
    saved, train_weight = ctx.saved_tensors, ctx.needs_input_grad[1]
    dhidden, dweight, dbias = linear_cross_entropy_backward(
        dloss.contiguous(),
        dlog_prob.contiguous(),
        dlse.contiguous(),
        *saved,
        *ctx.options,
        train_weight,
        ctx.weight_grad,
        ctx.backend,
    )
    returned = train_weight and ctx.weight_grad is None
    dbias = None if saved[2] is None else dbias
    return dhidden, dweight if returned else None, dbias, *[None] * 10


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
