"""C++ kernels of attention maps, contributions and their KL (CPU): csrc/cpu/attention_map.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import native
from groundkern.calls import Call
from groundkern.op_body import empty_like
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    KL_MEAN,
    MAP,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Saved,
    Upstream,
    like_gradients,
    output_shape,
)
from groundkern.selection import Selection

KINDS = (MAP, CONTRIBUTION, KL_MEAN, KL_EACH)  # in the order of MapKind in csrc/ops.h


def unsupported(inputs: Inputs) -> str | None:
    """Why native cannot serve this call, in one sentence; None if it can."""
    return native.unsupported_heads(inputs.q, inputs.k, inputs.v)


def forward(inputs: Inputs, call: Call) -> Outputs:
    """fp32 [N, C], of a KL [N]."""
    from groundkern import _C

    out = torch.empty(output_shape(inputs, call.selection.columns, call.options))
    tensors = _tensors(inputs, call.selection) | {"out": out}
    native.call(_C.attention_map_forward, tensors, **_named(call.options))
    return Outputs(out, out.new_empty(0), out.new_empty(0))


def backward(above: Upstream, inputs: Inputs, saved: Saved, call: Call) -> Gradients:
    """Contiguous, in the inputs' dtypes and shapes."""
    from groundkern import _C

    like = like_gradients(inputs, call.options)
    gradients = Gradients(*(None if x is None else empty_like(x) for x in like))
    tensors = _tensors(inputs, call.selection) | above._asdict() | gradients._asdict()
    native.call(_C.attention_map_backward, tensors, **_named(call.options))
    return gradients


def _tensors(inputs: Inputs, selection: Selection) -> dict[str, Tensor | None]:
    target = None if inputs.target is None else inputs.target.float()
    absent = dict.fromkeys(Inputs._fields)
    operands = native.operands(inputs._replace(target=target))
    return absent | operands | native.selection(selection)


def _named(options: Options) -> dict[str, int | float]:
    """As _C names them."""
    return {
        "kind": KINDS.index(options.kind),
        "over_columns": options.over == "columns",
        "rectify": options.rectify,
        "scale": options.scale,
        "softcap": options.softcap,
        "lse_grad": options.lse_grad,
    }
