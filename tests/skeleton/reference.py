"""The specification, in plain torch: y_nd = scale factor_n x_nd."""

from functools import partial

from torch import Tensor

from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import vjp
from tests.skeleton import Gradients, Inputs, Options, Upstream


def _block(x: Tensor, factor: Tensor, *, options: Options) -> Tensor:
    return options.scale * factor[:, None] * x


def _wide(inputs: Inputs) -> list[Tensor]:
    dtype = accumulation_dtype(inputs.x.dtype)
    return [x.to(dtype) for x in inputs]


def forward(inputs: Inputs, options: Options) -> Tensor:
    return _block(*_wide(inputs), options=options).to(inputs.x.dtype)


def backward(upstream: Upstream, inputs: Inputs, options: Options) -> Gradients:
    """By autograd on `_block`, so that it checks what the kernels derive by hand."""
    wide = _wide(inputs)
    dx, dfactor = vjp(partial(_block, options=options), wide, [upstream.dy.to(wide[0].dtype)])
    return Gradients(dx.to(inputs.x.dtype), dfactor)
