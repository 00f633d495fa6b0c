"""Calls of side attention that tests and benchmarks share."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from groundkern.ops.cases import Call, coin, integers, randn
from groundkern.ops.side_attention.api import side_attention
from groundkern.selection import KeySets, QueryRows


def call(
    rows: QueryRows,
    dtype: torch.dtype,
    *,
    sequences: int = 2,
    keys: int = 45,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    **options,
) -> Call:
    """Random q, k, v around the given rows."""
    device = rows.sequence.device
    q = randn(1, len(rows), heads[0], dims[0], dtype=dtype, device=device)
    k = randn(2, sequences, heads[1], keys, dims[0], dtype=dtype, device=device)
    v = randn(3, sequences, heads[1], keys, dims[1], dtype=dtype, device=device)
    inputs = {"q": q, "k": k, "v": v}
    return Call(side_attention, inputs, {"rows": rows, **options}, differentiable=2)


def _rows(device: torch.device) -> QueryRows:
    return QueryRows.causal(integers([0, 0, 0, 1, 1], device), integers([44, 3, 31, 0, 32], device))


def main_lse(c: Call) -> Tensor:
    """The statistics of the main pass: over all visible keys."""
    unrestricted = {**c.options, "allowed": None, "backend": "reference"}
    return c.function(**c.inputs, **unrestricted).lse


def _causal(dtype, device) -> Call:
    return call(_rows(device), dtype)


def _regions(dtype, device) -> Call:
    visual = coin(4, 2, 45, device=device, chance=0.7)
    inside = visual[[0, 1, 1]] & coin(5, 3, 45, device=device, chance=0.2)
    index = integers([0, -1, 0, 2, 1], device)
    sets = KeySets.regions(visual, inside, integers([0, 1, 1], device), index)
    return call(_rows(device), dtype, allowed=sets)


def _main_statistics(dtype, device) -> Call:
    c = _regions(dtype, device)
    return replace(c, options={**c.options, "lse": main_lse(c)})


def _underflow(dtype, device) -> Call:
    """The allowed keys score so far below the main maximum that exp(s - lse) is 0 in fp32."""
    c = _causal(dtype, device)
    allowed = torch.zeros(1, 45, dtype=torch.bool, device=device)
    allowed[:, 2:4] = True
    k = c.inputs["k"].clone()
    q = c.inputs["q"].abs() + 0.5
    k[:, :, 1] = 40.0  # scores near +200, seen by every row but the one at position 0
    k[:, :, 2:4] = -20.0 + k[:, :, 2:4]
    c = replace(c, inputs={**c.inputs, "q": q, "k": k})
    sets = KeySets.from_bool(allowed, torch.zeros(5, dtype=torch.int32, device=device))
    c = replace(c, options={**c.options, "allowed": sets})
    return replace(c, options={**c.options, "lse": main_lse(c)})


def _window_and_documents(dtype, device) -> Call:
    rows = QueryRows.causal(
        integers([0, 0, 1, 1], device),
        integers([20, 44, 9, 40], device),
        start=integers([16, 16, 0, 30], device),
        window=12,
    )
    return call(rows, dtype)


def _softcap(dtype, device) -> Call:
    return call(_rows(device), dtype, dims=(20, 12), softcap=2.0, scale=0.7)


def _multi_query(dtype, device) -> Call:
    return call(_rows(device), dtype, heads=(6, 1), dims=(24, 40))


def _odd_group(dtype, device) -> Call:
    return call(_rows(device), dtype, heads=(6, 2), dims=(72, 72))


def _rows_without_keys(dtype, device) -> Call:
    """A padding row, a row whose set is empty, and one whose set is only of later keys."""
    rows = QueryRows.causal(integers([0, 0, 0, 1], device), integers([-1, 7, 5, 6], device))
    allowed = torch.zeros(3, 45, dtype=torch.bool, device=device)
    allowed[1, 6:] = True
    allowed[2, ::2] = True
    sets = KeySets.from_bool(allowed, integers([2, 0, 1, 2], device))
    return call(rows, dtype, allowed=sets)


def _no_rows(dtype, device) -> Call:
    none = torch.zeros(0, dtype=torch.int32, device=device)
    return call(QueryRows(none, none, none, none), dtype)


def _no_sets(dtype, device) -> Call:
    allowed = torch.zeros(0, 45, dtype=torch.bool, device=device)
    index = torch.full((5,), -1, dtype=torch.int32, device=device)
    return call(_rows(device), dtype, allowed=KeySets.from_bool(allowed, index))


def _one_key(dtype, device) -> Call:
    rows = QueryRows.causal(integers([0], device), integers([0], device))
    return call(rows, dtype, sequences=1, keys=1)


def _strided(dtype, device) -> Call:
    """k and v as views of [B, S, H, 2 D], q gathered from one: as attention layers have them."""
    c = _regions(dtype, device)
    shape = (2, 45, 2, 32)
    k = randn(6, *shape, dtype=dtype, device=device).transpose(1, 2)[..., :16]
    v = randn(7, *shape, dtype=dtype, device=device).transpose(1, 2)[..., 16:]
    q = randn(8, 4, 5, 32, dtype=dtype, device=device)[..., 8:24].transpose(0, 1)
    return replace(c, inputs={"q": q, "k": k, "v": v})


def _many_keys(dtype, device) -> Call:
    """Keys off every tile size, sets that leave whole tiles out."""
    rows = QueryRows.causal(
        torch.zeros(9, dtype=torch.int32, device=device), integers(range(350, 611, 30), device)
    )
    allowed = torch.zeros(2, 611, dtype=torch.bool, device=device)
    allowed[0, :5] = allowed[1, 333:401] = True
    sets = KeySets.from_bool(allowed, integers([0, 0, 1, 1, 0, -1, 1, 0, 1], device))
    return call(rows, dtype, sequences=1, keys=611, heads=(4, 4), dims=(32, 32), allowed=sets)


CASES: dict[str, Callable[[torch.dtype, torch.device], Call]] = {
    f.__name__.lstrip("_"): f
    for f in (
        _causal,
        _regions,
        _main_statistics,
        _underflow,
        _window_and_documents,
        _softcap,
        _multi_query,
        _odd_group,
        _rows_without_keys,
        _no_rows,
        _no_sets,
        _one_key,
        _strided,
        _many_keys,
    )
}
