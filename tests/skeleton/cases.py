"""Calls of the skeleton: every edge that a kernel could get wrong."""

from functools import partial

import torch

from groundkern.ops.cases import Call, randn
from tests.skeleton.api import scaled_rows


def call(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 37,
    dim: int = 24,
    strided: bool = False,
    **options,
) -> Call:
    x = randn(1, rows, 2 * dim, dtype=dtype, device=device)[:, ::2] if strided else None
    if x is None:
        x = randn(1, rows, dim, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = randn(2, rows, dtype=wide, device=device)
    return Call(scaled_rows, {"x": x, "factor": factor}, options)


CASES = {
    "rows": call,
    "scale": partial(call, scale=0.3),
    "one_row": partial(call, rows=1),
    "no_rows": partial(call, rows=0),
    "whole_tiles": partial(call, rows=32, dim=16),
    "one_column": partial(call, dim=1),
    "strided": partial(call, strided=True),
}
