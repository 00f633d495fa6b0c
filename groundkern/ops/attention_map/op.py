"""`groundkern::attention_map` and its backward, opaque to torch.compile, and what eager calls
run without torch's dispatcher (`groundkern.together`).

An op's absent gradient travels as an empty tensor, because an op's outputs cannot be None.
"""

from functools import cache

from torch import Tensor
from torch.library import custom_op

from groundkern import together
from groundkern.calls import Call
from groundkern.op_body import empty_like, grouped, op_body, regroup, schema
from groundkern.ops.attention_map import (
    NO_MAP_PLAN,
    Inputs,
    MapPlan,
    Options,
    Outputs,
    Saved,
    Upstream,
    like_gradients,
    output_shape,
    saved_shapes,
)
from groundkern.precision import accumulation_dtype
from groundkern.selection import KeySets, QueryRows, Selection


@cache
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


def plan(
    backend: str,
    inputs: Inputs,
    rows: QueryRows,
    allowed: KeySets | None,
    columns: Tensor,
    options: Options,
) -> MapPlan:
    """What the backend's kernels use of the selection and the target."""
    if backend != "triton":
        return NO_MAP_PLAN
    return kernels(backend).plan(inputs, rows, allowed, columns, options)


def call(
    backend: str,
    inputs: Inputs,
    rows: QueryRows,
    allowed: KeySets | None,
    columns: Tensor,
    options: Options,
) -> Call:
    """What is called with each layer's inputs of one signature."""
    found = plan(backend, inputs, rows, allowed, columns, options)
    return Call(Selection.of(rows, allowed, columns), found, options, backend)


RESULTS = 1  # of the `Outputs`, that are differentiable


def dispatched(inputs: Inputs, call: Call) -> tuple[Tensor]:
    """The result, by the op."""
    return attention_map(*inputs, *call.flat)[:RESULTS]


def saved(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """What the backward reads of a forward's outputs."""
    return outputs[1:]


@custom_op(
    "groundkern::attention_map",
    mutates_args=(),
    schema=(
        f"({schema(Inputs, Selection, MapPlan, Options)}, str backend) -> (Tensor, Tensor, Tensor)"
    ),
)
@op_body(Inputs, Selection, MapPlan, Options)
def attention_map(inputs, *others) -> Outputs:
    call = Call(*others, whole=True)
    return tuple(kernels(call.backend).forward(inputs, call))


@attention_map.register_fake
@grouped(Inputs, Selection, MapPlan, Options)
def _(inputs, selection, plan, options, backend):
    shape = output_shape(inputs, selection.columns, options)
    shapes = (shape, *saved_shapes(inputs, selection, plan, options))
    wide = accumulation_dtype(inputs.q.dtype)
    return tuple(inputs.q.new_empty(x, dtype=wide) for x in shapes)


@custom_op(
    "groundkern::attention_map_backward",
    mutates_args=(),
    schema=(
        f"({schema(Upstream, Inputs, Saved, Selection, MapPlan, Options)}, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
@op_body(Upstream, Inputs, Saved, Selection, MapPlan, Options)
def attention_map_backward(above, inputs, saved, *others) -> tuple[Tensor, ...]:
    call = Call(*others)
    gradients = kernels(call.backend).backward(above, inputs, saved, call)
    return tuple(above.upstream.new_empty(0) if x is None else x for x in gradients)


@attention_map_backward.register_fake
@grouped(Upstream, Inputs, Saved, Selection, MapPlan, Options)
def _(above, inputs, saved, selection, plan, options, backend):
    like = like_gradients(inputs, options)
    return tuple(above.upstream.new_empty(0) if x is None else empty_like(x) for x in like)


def _setup_context(ctx, inputs, output) -> None:
    inputs, selection, plan, options, backend = regroup(inputs, Inputs, Selection, MapPlan, Options)
    ctx.save_for_backward(*inputs, *output[1:], *selection, *plan[:-1])
    ctx.options = (plan.lanes, *options, backend)
    ctx.present = [x is not None for x in like_gradients(inputs, options)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream: Tensor | None, *_):
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    gradients = attention_map_backward(upstream.contiguous(), *ctx.saved_tensors, *ctx.options)
    *gradients, dlse = [d if there else None for d, there in zip(gradients, ctx.present)]
    of_inputs = (*gradients, None, dlse)  # a target has none
    return *of_inputs, *[None] * (len(ctx.needs_input_grad) - len(of_inputs))


attention_map.register_autograd(_backward, setup_context=_setup_context)


def backward(above, inputs: Inputs, saved, call: Call, dk: Tensor | None, dv: Tensor | None):
    """The gradients of the inputs by the kernels; those of k and v with what others found.

    Args:
        above: the gradient of the result.
        saved: the fields of `Saved`.
        dk, dv: what others found, which is written to.
    """
    upstream, saved = Upstream(above[0].contiguous()), Saved(*saved)
    body = kernels(call.backend).backward
    if dk is not None and _adds(call):
        return _of_inputs(body(upstream, inputs, saved, call, dk), None, dv)
    return _of_inputs(body(upstream, inputs, saved, call), dk, dv)


def _adds(call: Call) -> bool:
    """Whether the kernels add to a dk, which they divide by scale: where few keys have columns."""
    options = call.options
    return call.backend == "triton" and options.over == "columns" and 1e-6 < options.scale < 1e6


def dispatched_backward(above, inputs: Inputs, saved, call: Call, dk, dv):
    """The same by the op, for gradients that are batched, or differentiated again."""
    found = attention_map_backward(above[0].contiguous(), *inputs, *saved, *call.flat)
    pairs = zip(found, like_gradients(inputs, call.options), strict=True)
    return _of_inputs([None if x is None else d for d, x in pairs], dk, dv, ours=False)


def _of_inputs(found, dk: Tensor | None, dv: Tensor | None, *, ours: bool = True) -> tuple:
    """`Gradients` as one for each of the `Inputs`."""
    dq, own_dk, own_dv, dg, dweight, dlse = found
    dk, dv = together.added(own_dk, dk, ours=ours), together.added(own_dv, dv, ours=ours)
    return dq, dk, dv, dg, dweight, None, dlse  # a target has none
