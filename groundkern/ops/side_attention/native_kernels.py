"""C++ kernels of side attention (CPU): csrc/cpu/side_attention.cpp on raw pointers and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import native
from groundkern.calls import Call
from groundkern.op_body import empty_like
from groundkern.ops.side_attention import Inputs, Outputs, Upstream


def unsupported(inputs: Inputs) -> str | None:
    """Why the C++ kernels cannot serve this call, in one sentence; None if they can."""
    return native.unsupported_heads(*inputs[:3])


def forward(inputs: Inputs, call: Call) -> Outputs:
    """The given lse is only a shift: with its running maximum this forward needs none."""
    from groundkern import _C

    q, _, v, _ = inputs
    out = torch.empty(*q.shape[:2], v.shape[3], dtype=q.dtype)
    outputs = Outputs(out, torch.empty(q.shape[:2]), q.new_empty(0))
    operands = native.operands(inputs._replace(lse=None))
    tensors = operands | native.selection(call.selection) | {"out": out, "lse": outputs.lse}
    native.call(_C.side_attention_forward, tensors, **call.options._asdict())
    return outputs


def backward(
    upstream: Upstream, inputs: Inputs, outputs: Outputs, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run.

    out is for backends that take delta from it: here delta is summed from p, free of out's
    rounding.
    """
    from groundkern import _C

    gradients = {f"d{name}": empty_like(x) for name, x in zip("qkv", inputs)}
    operands = native.operands(inputs._replace(lse=outputs.lse))
    above = {f"d{name}": native.rows_contiguous(x) for name, x in upstream._asdict().items()}
    tensors = operands | above | native.selection(call.selection) | gradients
    native.call(_C.side_attention_backward, tensors, **call.options._asdict())
    return tuple(gradients.values())
