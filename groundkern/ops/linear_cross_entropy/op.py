"""`groundkern::linear_cross_entropy` and its backward: opaque to torch.compile, one implementation
per backend.

`linear_cross_entropy_with_gradients` makes the gradients where the logits are, in the forward; its
backward only scales them. That needs upstream gradients known but for one factor: of the loss
alone, one for all rows, or with a frozen head one per row.

`linear_cross_entropy` makes them in its backward, from logits made anew, or from those that the
forward kept: `keep`, for a backend that `keeps` them.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.op_body import op_body
from groundkern.precision import accumulation_dtype

INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? ids, Tensor? offsets, "
    "Tensor? bag_index"
)
OPTIONS = "float smoothing, int ignore_index, float softcap"


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


@custom_op(
    "groundkern::linear_cross_entropy",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor? weight_grad, {OPTIONS}, str group, bool keep, str backend)"
    f" -> ({', '.join(['Tensor'] * 5)})",
)
@op_body
def linear_cross_entropy(*arguments) -> tuple[Tensor, ...]:
    """Per row: loss, log p(target), lse, likeliest id; and what was kept of the logits.

    `weight_grad` is for the backward.
    """
    *inputs, _, smoothing, ignore_index, softcap, group, keep, backend = arguments
    options = (smoothing, ignore_index, softcap, group)
    if keep:
        return kernels(backend).forward_keeping(*inputs, *options)
    return *kernels(backend).forward(*inputs, *options), _nothing_kept(inputs[0])


@linear_cross_entropy.register_fake
def _(hidden, weight, bias, target, *rest):
    *_, keep, backend = rest
    wide = accumulation_dtype(hidden.dtype)
    rows = [hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3)]
    size = kernels(backend).kept_bytes(hidden, weight) if keep else 0
    return *rows, target.new_empty(target.shape), hidden.new_empty(size, dtype=torch.uint8)


def _nothing_kept(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


@custom_op(
    "groundkern::linear_cross_entropy_backward",
    mutates_args=("weight_grad",),
    schema=f"(Tensor dloss, Tensor dlog_prob, Tensor dlse, {INPUTS}, {OPTIONS}, str group,"
    " bool train_weight, Tensor(a!)? weight_grad, Tensor kept, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
@op_body
def linear_cross_entropy_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, kept, backend = arguments
    known = {"kept": kept} if kept.numel() > 0 else {}
    gradients = kernels(backend).backward(*inputs, **known)
    return tuple(inputs[0].new_empty(0) if x is None else x for x in gradients)


@linear_cross_entropy_backward.register_fake
def _(dloss, dlog_prob, dlse, hidden, weight, bias, *rest):
    *_, train_weight, weight_grad, _, _ = rest
    returned = train_weight and weight_grad is None
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        weight.new_empty(weight.shape) if returned else hidden.new_empty(0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, weight_grad, smoothing, ignore_index, softcap, group, _, backend = inputs
    ctx.save_for_backward(*tensors, output[-1])
    ctx.set_materialize_grads(False)  # no zeros as large as what was kept
    ctx.weight_grad = weight_grad
    ctx.options = (smoothing, ignore_index, softcap, group)
    ctx.backend = backend


def _backward(ctx, *upstream: Tensor | None):
    (*saved, kept), train_weight = ctx.saved_tensors, ctx.needs_input_grad[1]
    hidden, _, _, target, *_ = saved
    none = target.new_zeros(target.shape, dtype=accumulation_dtype(hidden.dtype))
    dhidden, dweight, dbias = linear_cross_entropy_backward(
        *(none if x is None else x.contiguous() for x in upstream[:3]),
        *saved,
        *ctx.options,
        train_weight,
        ctx.weight_grad,
        kept,
        ctx.backend,
    )
    returned = train_weight and ctx.weight_grad is None
    dbias = None if saved[2] is None else dbias
    return dhidden, dweight if returned else None, dbias, *[None] * 11


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def gradients_in_forward(backend: str) -> bool:
    """Whether a backend has `forward_with_gradients`."""
    return backend in ("native", "triton")


def keeps(backend: str, hidden: Tensor, weight: Tensor) -> bool:
    """Whether a forward of these sizes can keep its logits for the backward."""
    return backend == "native" and kernels(backend).keeps(hidden, weight)


@custom_op(
    "groundkern::linear_cross_entropy_with_gradients",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor? row_factor, {OPTIONS}, bool train_weight, str backend)"
    f" -> ({', '.join(['Tensor'] * 7)})",
)
@op_body
def linear_cross_entropy_with_gradients(*arguments) -> tuple[Tensor, ...]:
    """loss (scalar with row_factor [N], else per row), log p(target), lse, likeliest id, and the
    gradients dhidden, dweight, dbias of that loss (per row: of each row's own loss)."""
    *inputs, backend = arguments
    results = kernels(backend).forward_with_gradients(*inputs)
    return tuple(inputs[0].new_empty(0) if x is None else x for x in results)


@linear_cross_entropy_with_gradients.register_fake
def _(hidden, weight, bias, target, ids, offsets, bag_index, row_factor, *rest):
    *_, train_weight, _ = rest
    wide = accumulation_dtype(hidden.dtype)
    rows = [hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3)]
    if row_factor is not None:
        rows[0] = hidden.new_empty((), dtype=wide)
    return (
        *rows,
        target.new_empty(target.shape),
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        weight.new_empty(weight.shape) if train_weight else hidden.new_empty(0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _store_gradients(ctx, inputs, output) -> None:
    *tensors, smoothing, ignore_index, softcap, train_weight, backend = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # no zeros in dweight's shape for outputs nobody uses
    ctx.gradients = rest[3:]
    ctx.save_for_backward(*tensors)
    ctx.options = (smoothing, ignore_index, softcap, "", train_weight, None)
    ctx.backend = backend


def _scale_gradients(ctx, dloss: Tensor, *_):
    """The stored gradients are handed out once; a second backward, and one that is to be
    differentiated again (which is refused), makes them anew."""
    train_weight, train_bias = ctx.options[4], ctx.needs_input_grad[2]
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None or torch.is_grad_enabled():
        *tensors, row_factor = ctx.saved_tensors
        rows = dloss.contiguous() if row_factor is None else dloss * row_factor
        none = torch.zeros_like(rows)
        kept = _nothing_kept(rows)
        gradients = linear_cross_entropy_backward(
            rows, none, none, *tensors, *ctx.options, kept, ctx.backend
        )
    else:
        used = (True, train_weight, train_bias)
        scaled = partial(_scaled, backend=ctx.backend)
        gradients = [scaled(x, dloss) if y else x for x, y in zip(gradients, used, strict=True)]
    dhidden, dweight, dbias = gradients
    return dhidden, dweight if train_weight else None, dbias if train_bias else None, *[None] * 10


def _scaled(gradient: Tensor, dloss: Tensor, backend: str) -> Tensor:
    """gradient * dloss; itself where dloss is seen to be 1, as for a loss used by itself."""
    visible = type(dloss) is Tensor and dloss.device.type == "cpu"  # not traced, no sync
    if visible and dloss.dim() == 0 and float(dloss) == 1.0:
        return gradient
    factor = dloss[:, None] if dloss.dim() == 1 else dloss
    if visible and backend == "native":
        return kernels(backend).scaled(gradient, factor)
    return (gradient * factor).to(gradient.dtype)


linear_cross_entropy_with_gradients.register_autograd(
    _scale_gradients, setup_context=_store_gradients
)
