"""`groundkern_skeleton::scaled_rows` and its backward, opaque to torch.compile."""

from torch import Tensor
from torch.library import custom_op

from groundkern.op_body import empty_like, grouped, op_body, regroup, schema
from tests.skeleton import Inputs, Options, Upstream


@custom_op(
    "groundkern_skeleton::scaled_rows",
    mutates_args=(),
    schema=f"({schema(Inputs, Options)}, str backend) -> Tensor",
)
@op_body(Inputs, Options)
def scaled_rows(inputs, options, backend) -> Tensor:
    return kernels(backend).forward(inputs, options)


@scaled_rows.register_fake
@grouped(Inputs)
def _(inputs, *_):
    return empty_like(inputs.x)


@custom_op(
    "groundkern_skeleton::scaled_rows_backward",
    mutates_args=(),
    schema=f"({schema(Upstream, Inputs, Options)}, str backend) -> (Tensor, Tensor)",
)
@op_body(Upstream, Inputs, Options)
def scaled_rows_backward(upstream, inputs, options, backend) -> tuple[Tensor, Tensor]:
    return tuple(kernels(backend).backward(upstream, inputs, options))


@scaled_rows_backward.register_fake
@grouped(Upstream, Inputs)
def _(upstream, inputs, *_):
    return tuple(empty_like(x) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:
    inputs, *ctx.options = regroup(inputs, Inputs)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    gradients = scaled_rows_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


scaled_rows.register_autograd(_backward, setup_context=_setup_context)


def kernels(backend: str):
    """The module of a backend, imported when it is first needed.

    Not by a computed name, which `torch.compile` could not trace.
    """
    match backend:
        case "native":
            from tests.skeleton import native_kernels as module
        case "triton":
            from tests.skeleton import triton_launch as module
        case _:
            from tests.skeleton import reference as module
    return module
