"""`groundkern::side_attention` and its backward, opaque to torch.compile."""

import torch
from torch import Tensor
from torch.library import custom_op

from groundkern.op_body import op_body
from groundkern.precision import accumulation_dtype

INPUTS = "Tensor q, Tensor k, Tensor v"
SELECTION = "Tensor sequence, Tensor start, Tensor stop, Tensor? words, Tensor? set_index"
OPTIONS = "float scale, float softcap, str backend"


def kernels(backend: str):
    """The module that implements `forward` and `backward` for a backend."""
    match backend:
        case "native":
            from groundkern.ops.side_attention import native_kernels as module
        case "triton":
            from groundkern.ops.side_attention import triton_kernels as module
        case _:
            from groundkern.ops.side_attention import reference as module
    return module


@custom_op(
    "groundkern::side_attention",
    mutates_args=(),
    schema=f"({INPUTS}, {SELECTION}, Tensor? lse, {OPTIONS}) -> (Tensor, Tensor)",
)
@op_body
def side_attention(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return kernels(backend).forward(*inputs)


@side_attention.register_fake
def _(q, k, v, *_):
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=accumulation_dtype(q.dtype))


@custom_op(
    "groundkern::side_attention_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor dlse, {INPUTS}, Tensor out, Tensor own_lse, {SELECTION}, {OPTIONS})"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
@op_body
def side_attention_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    return kernels(backend).backward(*inputs)


@side_attention_backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sequence, start, stop, words, set_index, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sequence, start, stop, words, set_index)


def _backward(ctx, dout: Tensor, dlse: Tensor):
    gradients = side_attention_backward(
        dout.contiguous(), dlse.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return *gradients, *[None] * 9


side_attention.register_autograd(_backward, setup_context=_setup_context)
