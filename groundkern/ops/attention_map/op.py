"""`groundkern::attention_map` and its backward, opaque to torch.compile.

An absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

from typing import NamedTuple

from torch import Tensor

from groundkern.op_body import empty_like, grouped, op_body, regroup, schema
from groundkern.opaque import custom_op
from groundkern.ops.attention_map import Inputs, Options, like_gradients, output_shape
from groundkern.precision import accumulation_dtype
from groundkern.selection import Selection


def kernels(backend: str):
    """The module that implements `forward` and `backward` for a backend."""
    match backend:
        case "native":
            from groundkern.ops.attention_map import native_kernels as module
        case "triton":
            from groundkern.ops.attention_map import triton_launch as module
        case _:
            from groundkern.ops.attention_map import reference as module
    return module


@custom_op(
    "groundkern::attention_map",
    mutates_args=(),
    schema=f"({schema(Inputs, Selection, Options)}, str backend) -> Tensor",
)
@op_body(Inputs, Selection, Options)
def attention_map(inputs, selection, options, backend) -> Tensor:
    return kernels(backend).forward(inputs, selection, options)


@attention_map.register_fake
@grouped(Inputs, Selection, Options)
def _(inputs, selection, options, backend):
    shape = output_shape(inputs, selection.columns, options)
    return inputs.q.new_empty(shape, dtype=accumulation_dtype(inputs.q.dtype))


class _Upstream(NamedTuple):
    upstream: Tensor  # like the output


@custom_op(
    "groundkern::attention_map_backward",
    mutates_args=(),
    schema=(
        f"({schema(_Upstream, Inputs, Selection, Options)}, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
@op_body(_Upstream, Inputs, Selection, Options)
def attention_map_backward(above, inputs, selection, options, backend) -> tuple[Tensor, ...]:
    gradients = kernels(backend).backward(above.upstream, inputs, selection, options)
    return tuple(above.upstream.new_empty(0) if x is None else x for x in gradients)


@attention_map_backward.register_fake
@grouped(_Upstream, Inputs, Selection, Options)
def _(above, inputs, selection, options, backend):
    like = like_gradients(inputs, options)
    return tuple(above.upstream.new_empty(0) if x is None else empty_like(x) for x in like)


def _setup_context(ctx, inputs, output) -> None:
    inputs, selection, options, backend = regroup(inputs, Inputs, Selection, Options)
    ctx.save_for_backward(*inputs, *selection)
    ctx.options = (*options, backend)
    ctx.present = [x is not None for x in like_gradients(inputs, options)]


def _backward(ctx, upstream: Tensor):
    gradients = attention_map_backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.options)
    *gradients, dlse = [d if there else None for d, there in zip(gradients, ctx.present)]
    of_inputs = (*gradients, None, dlse)  # a target has none
    return *of_inputs, *[None] * (len(ctx.needs_input_grad) - len(of_inputs))


attention_map.register_autograd(_backward, setup_context=_setup_context)
