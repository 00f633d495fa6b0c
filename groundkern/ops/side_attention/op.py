"""`groundkern::side_attention` and its backward, opaque to torch.compile."""

from torch import Tensor

from groundkern.op_body import empty_like, grouped, op_body, regroup, schema
from groundkern.opaque import custom_op
from groundkern.ops.side_attention import Inputs, Options, Outputs, Upstream
from groundkern.plan import NO_PLAN, Plan
from groundkern.precision import accumulation_dtype
from groundkern.selection import KeySets, QueryRows, Selection


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


@custom_op(
    "groundkern::side_attention",
    mutates_args=(),
    schema=f"({schema(Inputs, Selection, Plan, Options)}, str backend) -> (Tensor, Tensor, Tensor)",
)
@op_body(Inputs, Selection, Plan, Options)
def side_attention(inputs, selection, plan, options, backend) -> Outputs:
    return tuple(kernels(backend).forward(inputs, selection, plan, options))


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
def side_attention_backward(
    upstream, inputs, outputs, selection, plan, options, backend
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(backend).backward(upstream, inputs, outputs, selection, plan, options)


@side_attention_backward.register_fake
@grouped(Upstream, Inputs)
def _(upstream, inputs, *_):
    return tuple(empty_like(x) for x in inputs[:3])


def _setup_context(ctx, inputs, output) -> None:
    inputs, selection, plan, *options = regroup(inputs, Inputs, Selection, Plan)
    tensors, sizes = plan.divided()
    ctx.save_for_backward(*inputs._replace(lse=None), *output, *selection, *tensors)
    ctx.options = (*sizes, *options)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):
    saved = ctx.saved_tensors  # once: checkpointing gives them out once
    q, _, v, _, _, lse, *_ = saved
    dout = q.new_zeros(*q.shape[:2], v.shape[3]) if dout is None else dout.contiguous()
    dlse = lse.new_zeros(lse.shape) if dlse is None else dlse.contiguous()
    gradients = side_attention_backward(dout, dlse, *saved, *ctx.options)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


side_attention.register_autograd(_backward, setup_context=_setup_context)
