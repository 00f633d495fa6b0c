"""From the fields of single samples to the padded tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern.hf.data.batch import FIELDS

SampleFields = dict[str, Any]
"""What one sample supervises, by names of `FIELDS`: tensors or nested lists without the batch
dimension and without padding. A field that is not there has no rows."""


def pad_fields(
    samples: Sequence[SampleFields], lengths: Sequence[int], *, left: bool, multiple: int = 1
) -> dict[str, Tensor]:
    """The `gk_` tensors of a batch.

    Args:
        samples: the fields of each sample; positions count its own tokens from 0.
        lengths: the tokens of each sample.
        left: whether `input_ids` are padded on the left, which moves every position.
        multiple: what the padded length is a multiple of.

    Returns:
        Every tensor of `FIELDS`, with the prefix `gk_`.
    """
    unknown = {name for sample in samples for name in sample} - FIELDS.keys()
    assert not unknown, f"no fields of a batch: {unknown}"
    samples = [with_weights(sample) for sample in samples]
    length = padded_length(lengths, multiple)
    sizes = {"B": len(samples), "S": length}
    for sample in samples:
        for name, values in sample.items():
            _measure(sizes, FIELDS[name].dims.split()[1:], values)
    batch = {}
    for name, spec in FIELDS.items():
        dims = spec.dims.split()
        shape = [int(dim) if dim.isdigit() else sizes.get(dim, 0) for dim in dims]
        out = torch.full(shape, spec.padding, dtype=spec.dtype)
        for row, sample, own in zip(out, samples, lengths):
            shift = length - own if left else 0
            _write(row[..., shift:] if dims[-1] == "S" else row, sample.get(name, ()))
            if spec.is_position:
                row[row >= 0] += shift
        batch[f"gk_{name}"] = out
    return batch


def with_weights(sample: SampleFields) -> SampleFields:
    """The fields of a sample with the weights that it leaves out, of all of its rows.

    Args:
        sample: what it supervises.
    """
    weights = {}
    for name, spec in FIELDS.items():
        if spec.absent is not None and spec.dims.count(" ") == 1 and name not in sample:
            rows = f"{name.partition('_')[0]}_position"
            weights[name] = [spec.absent] * len(sample.get(rows, ()))
    return {**sample, **weights}


def padded_length(lengths: Sequence[int], multiple: int) -> int:
    """S of rows of these lengths, a multiple of a number."""
    return -(-max(lengths) // multiple) * multiple


def pad_tokens(
    rows: Sequence[Sequence[int]], fill: int, *, left: bool, multiple: int = 1
) -> Tensor:
    """Values per token, such as `input_ids`: int64 [B, S], padded with `fill`."""
    length = padded_length([len(row) for row in rows], multiple)
    out = torch.full((len(rows), length), fill)
    for padded, row in zip(out, rows):
        _write(padded[length - len(row) if left else 0 :], row)
    return out


def _measure(sizes: dict[str, int], dims: list[str], values: Tensor | Sequence[Any]) -> None:
    """Raise the size of each dimension to what `values` need."""
    if isinstance(values, Tensor):
        found = dict(zip(dims, values.shape))
    else:
        found = {dims[0]: len(values)}
        for each in values if len(dims) > 1 else ():
            _measure(sizes, dims[1:], each)
    for dim, size in found.items():
        sizes[dim] = max(size, sizes.get(dim, 0))


def _write(out: Tensor, values: Tensor | Sequence[Any]) -> None:
    """Write values of any smaller shape, ragged lists too, to the front of `out`."""
    if isinstance(values, Tensor):
        out[tuple(map(slice, values.shape))] = values
    elif out.dim() == 1:
        out[: len(values)] = torch.tensor(values, dtype=out.dtype)
    else:
        for row, each in zip(out, values, strict=False):
            _write(row, each)
