"""`groundkern::attention_map`, `groundkern::attention_kl` and their backwards, each opaque.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.op_body import op_body
from groundkern.precision import accumulation_dtype

# Both ops end in the same arguments: the selection (seven tensors), three options and the backend.
SELECTION = (
    "Tensor sequence, Tensor start, Tensor stop, Tensor columns, Tensor? words, Tensor? set_index, "
    "Tensor? lse, str over, float scale, float softcap, str backend"
)
MAP = f"Tensor q, Tensor k, Tensor? v, Tensor? g, Tensor? head_weight, bool rectify, {SELECTION}"
KL = f"Tensor q, Tensor k, Tensor head_weight, Tensor target, str heads, {SELECTION}"


def kernels(backend: str):
    """The module with a backend's `map_forward`, `map_backward`, `kl_forward`, `kl_backward`."""
    match backend:
        case "native":
            from groundkern.ops.attention_map import native_kernels as module
        case "triton":
            from groundkern.ops.attention_map import triton_kernels as module
        case _:
            from groundkern.ops.attention_map import reference as module
    return module


@custom_op("groundkern::attention_map", mutates_args=(), schema=f"({MAP}) -> Tensor")
@op_body
def attention_map(*arguments) -> Tensor:
    *inputs, backend = arguments
    return kernels(backend).map_forward(*inputs)


@attention_map.register_fake
def _(q, k, v, g, head_weight, rectify, sequence, start, stop, columns, *_):
    return q.new_empty(q.shape[0], columns.shape[1], dtype=accumulation_dtype(q.dtype))


@custom_op(
    "groundkern::attention_map_backward",
    mutates_args=(),
    schema=f"(Tensor dmap, {MAP}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@op_body
def attention_map_backward(*arguments) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    gradients = kernels(backend).map_backward(*inputs)
    return tuple(inputs[0].new_empty(0) if x is None else x for x in gradients)


@attention_map_backward.register_fake
def _(dmap, q, k, v, g, head_weight, *_):
    return tuple(dmap.new_empty(0) if x is None else _like(x) for x in (q, k, v, g, head_weight))


def _map_setup(ctx, inputs, output) -> None:
    q, k, v, g, head_weight, rectify, *selection, over, scale, softcap, backend = inputs
    ctx.save_for_backward(q, k, v, g, head_weight, *selection)
    ctx.rectify, ctx.options = rectify, (over, scale, softcap, backend)


def _map_vjp(ctx, dmap: Tensor):
    saved = ctx.saved_tensors
    inputs, selection = saved[:5], saved[5:]
    gradients = attention_map_backward(
        dmap.contiguous(), *inputs, ctx.rectify, *selection, *ctx.options
    )
    present = (None if x is None else d for x, d in zip(inputs, gradients, strict=True))
    return *present, *[None] * 12


attention_map.register_autograd(_map_vjp, setup_context=_map_setup)


@custom_op("groundkern::attention_kl", mutates_args=(), schema=f"({KL}) -> Tensor")
@op_body
def attention_kl(*arguments) -> Tensor:
    *inputs, backend = arguments
    return kernels(backend).kl_forward(*inputs)


@attention_kl.register_fake
def _(q, *_):
    return q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))


@custom_op(
    "groundkern::attention_kl_backward",
    mutates_args=(),
    schema=f"(Tensor dkl, {KL}) -> (Tensor, Tensor, Tensor)",
)
@op_body
def attention_kl_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    return kernels(backend).kl_backward(*inputs)


@attention_kl_backward.register_fake
def _(dkl, q, k, head_weight, *_):
    return tuple(_like(x) for x in (q, k, head_weight))


def _kl_setup(ctx, inputs, output) -> None:
    q, k, head_weight, target, heads, *selection, over, scale, softcap, backend = inputs
    ctx.save_for_backward(q, k, head_weight, target, *selection)
    ctx.heads, ctx.options = heads, (over, scale, softcap, backend)


def _kl_vjp(ctx, dkl: Tensor):
    saved = ctx.saved_tensors
    inputs, selection = saved[:4], saved[4:]
    gradients = attention_kl_backward(
        dkl.contiguous(), *inputs, ctx.heads, *selection, *ctx.options
    )
    return *gradients, *[None] * 13


attention_kl.register_autograd(_kl_vjp, setup_context=_kl_setup)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
