"""`groundkern::attention_map`, `groundkern::attention_kl` and their backwards, opaque to
torch.compile.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.precision import accumulation_dtype, without_autocast


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


def _like(x: Tensor | None, anchor: Tensor) -> Tensor:
    if x is None:
        return anchor.new_empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("groundkern::attention_map", mutates_args=())
@without_autocast
def attention_map(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    head_weight: Tensor | None,
    rectify: bool,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    over: str,
    scale: float,
    softcap: float,
    backend: str,
) -> Tensor:
    selection = (sequence, start, stop, columns, words, set_index, lse, over, scale, softcap)
    return kernels(backend).map_forward(q, k, v, g, head_weight, rectify, *selection)


@attention_map.register_fake
def _(q, k, v, g, head_weight, rectify, sequence, start, stop, columns, *_):
    return q.new_empty(q.shape[0], columns.shape[1], dtype=accumulation_dtype(q.dtype))


@custom_op("groundkern::attention_map_backward", mutates_args=())
@without_autocast
def attention_map_backward(
    dmap: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    head_weight: Tensor | None,
    rectify: bool,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    over: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    selection = (sequence, start, stop, columns, words, set_index, lse, over, scale, softcap)
    inputs = (q, k, v, g, head_weight)
    gradients = kernels(backend).map_backward(dmap, *inputs, rectify, *selection)
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


@attention_map_backward.register_fake
def _(dmap, q, k, v, g, head_weight, *_):
    return tuple(_like(x, q) for x in (q, k, v, g, head_weight))


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


@custom_op("groundkern::attention_kl", mutates_args=())
@without_autocast
def attention_kl(
    q: Tensor,
    k: Tensor,
    head_weight: Tensor,
    target: Tensor,
    heads: str,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    over: str,
    scale: float,
    softcap: float,
    backend: str,
) -> Tensor:
    selection = (sequence, start, stop, columns, words, set_index, lse, over, scale, softcap)
    return kernels(backend).kl_forward(q, k, head_weight, target, heads, *selection)


@attention_kl.register_fake
def _(q, *_):
    return q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))


@custom_op("groundkern::attention_kl_backward", mutates_args=())
@without_autocast
def attention_kl_backward(
    dkl: Tensor,
    q: Tensor,
    k: Tensor,
    head_weight: Tensor,
    target: Tensor,
    heads: str,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    columns: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    over: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    selection = (sequence, start, stop, columns, words, set_index, lse, over, scale, softcap)
    return kernels(backend).kl_backward(dkl, q, k, head_weight, target, heads, *selection)


@attention_kl_backward.register_fake
def _(dkl, q, k, head_weight, *_):
    return tuple(_like(x, q) for x in (q, k, head_weight))


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
