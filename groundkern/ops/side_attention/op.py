"""`groundkern::side_attention` and its backward, opaque to torch.compile, and what eager calls run
without torch's dispatcher (`groundkern.together`)."""

from functools import cache

from torch import Tensor
from torch.library import custom_op

from groundkern import together
from groundkern.calls import Call
from groundkern.op_body import empty_like, grouped, op_body, regroup, schema, zeros_like
from groundkern.ops.side_attention import Inputs, Options, Outputs, Upstream
from groundkern.plan import NO_PLAN, Plan
from groundkern.precision import accumulation_dtype
from groundkern.selection import KeySets, QueryRows, Selection


@cache
def kernels(backend: str):
    """The module that implements `forward` and `backward` for a backend."""
    match backend:
        case "native":
            from groundkern.ops.side_attention import native_kernels as module
        case "triton":
            from groundkern.ops.side_attention import triton_launch as module
        case _:
            from groundkern.ops.side_attention import reference as module
    return module


def plan(backend: str, inputs: Inputs, rows: QueryRows, allowed: KeySets | None) -> Plan:
    """What the backend's kernels use of the selection."""
    return kernels(backend).plan(inputs, rows, allowed) if backend == "triton" else NO_PLAN


def call(
    backend: str, inputs: Inputs, rows: QueryRows, allowed: KeySets | None, options: Options
) -> Call:
    """What is called with each layer's inputs of one signature."""
    found = plan(backend, inputs, rows, allowed)
    return Call(Selection.of(rows, allowed), found, options, backend)


RESULTS = 2  # of the `Outputs`, that are differentiable


def dispatched(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """The results, by the op."""
    return side_attention(*inputs, *call.flat)[:RESULTS]


def saved(outputs: Outputs) -> Outputs:
    """What the backward reads of a forward's outputs."""
    return outputs


@custom_op(
    "groundkern::side_attention",
    mutates_args=(),
    schema=f"({schema(Inputs, Selection, Plan, Options)}, str backend) -> (Tensor, Tensor, Tensor)",
)
@op_body(Inputs, Selection, Plan, Options)
def side_attention(inputs, *others) -> Outputs:
    call = Call(*others)
    return tuple(kernels(call.backend).forward(inputs, call))


@side_attention.register_fake
@grouped(Inputs)
def _(inputs, *others):
    rows, heads, _ = inputs.q.shape
    out = inputs.q.new_empty(rows, heads, inputs.v.shape[3])
    rest = empty_like(out) if others[-1] == "triton" and out.itemsize == 2 else out.new_empty(0)
    return out, out.new_empty(rows, heads, dtype=accumulation_dtype(out.dtype)), rest


@custom_op(
    "groundkern::side_attention_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor dlse, {schema(Inputs)}, Tensor out, Tensor own_lse, "
        "Tensor rest, "
        f"{schema(Selection, Plan, Options)}, str backend) -> (Tensor, Tensor, Tensor)"
    ),
)
@op_body(Upstream, Inputs, Outputs, Selection, Plan, Options)
def side_attention_backward(upstream, inputs, outputs, *others) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*others)
    return kernels(call.backend).backward(upstream, inputs, outputs, call)


@side_attention_backward.register_fake
@grouped(Upstream, Inputs)
def _(upstream, inputs, *_):
    return tuple(empty_like(x) for x in inputs[:3])


def _upstream(
    dout: Tensor | None, dlse: Tensor | None, like: Outputs, call: Call | None = None
) -> Upstream:
    """Contiguous; zeros where nothing was given."""
    dout = zeros_like(like.out) if dout is None else dout.contiguous()
    if dlse is None and call is not None:
        dlse = call.once("no dlse", lambda: zeros_like(like.lse))
    dlse = zeros_like(like.lse) if dlse is None else dlse.contiguous()
    return Upstream(dout, dlse)


def _setup_context(ctx, inputs, output) -> None:
    inputs, selection, plan, *options = regroup(inputs, Inputs, Selection, Plan)
    tensors, sizes = plan.divided()
    ctx.save_for_backward(*inputs._replace(lse=None), *output, *selection, *tensors)
    ctx.options = (*sizes, *options)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):
    saved = ctx.saved_tensors  # once: checkpointing gives them out once
    upstream = _upstream(dout, dlse, Outputs(*saved[len(Inputs._fields) :][:3]))
    gradients = side_attention_backward(*upstream, *saved, *ctx.options)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


side_attention.register_autograd(_backward, setup_context=_setup_context)


def backward(above, inputs: Inputs, saved, call: Call, dk: Tensor | None, dv: Tensor | None):
    """The gradients of the inputs by the kernels; those of k and v with what others found.

    Args:
        above: gradients of the results, or None.
        saved: the `Outputs`.
        dk, dv: what others found, which is written to.
    """
    outputs = Outputs(*saved)
    upstream = _upstream(*above, outputs, call)
    dq, *found = kernels(call.backend).backward(upstream, inputs, outputs, call)
    return dq, together.added(found[0], dk), together.added(found[1], dv), None


def dispatched_backward(above, inputs: Inputs, saved, call: Call, dk, dv):
    """The same by the op, for gradients that are batched, or differentiated again."""
    outputs = Outputs(*saved)
    upstream = _upstream(*above, outputs, call)
    inputs = inputs._replace(lse=None)
    dq, *found = side_attention_backward(*upstream, *inputs, *outputs, *call.flat)
    sums = (together.added(x, y, ours=False) for x, y in zip(found, (dk, dv), strict=True))
    return dq, *sums, None
