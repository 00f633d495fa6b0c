"""What a processor makes of several samples, from what it makes of each alone.

A packed batch knows the order of its samples only when their lengths are known, so that each is
processed alone. What a processor returns of images is one behind the other along the first
dimension, be it images, patches or samples, and zeros pad the other dimensions; where a family does
it otherwise it is said here, and `check_merged` compares with one call for them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import fail, require

# the dimension along which images are one behind the other, where it is not the first
_DIMS = {
    ("PerceptionLMProcessor", "pixel_values"): 1,  # [1, tiles, 3, H, W], by `calling`
    ("MiniCPMOcrProcessor", "pixel_values"): 3,  # [1, 3, patch, pixels of all patches]
    ("MiniCPMV4_6Processor", "pixel_values"): 3,
    ("MiniCPMV4_7Processor", "pixel_values"): 3,
}


def merge_features(processor: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The features of images of several samples, in their order.

    Args:
        processor: of a model.
        samples: what it returned for each alone, without what it has per token: tensors, and lists
            where images have sizes of their own. A sample without images has none.

    Returns:
        What one call for all would return; a row that it would keep for a sample without images
        is left out.

    Raises:
        ValueError: features of one name that do not fit each other.
    """
    merged: dict[str, Any] = {}
    kinds = [kind.__name__ for kind in type(processor).__mro__]
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        if all(isinstance(x, list) for x in values):
            merged[name] = [each for x in values for each in x]
            continue
        alike = {(type(x), x.dtype, x.dim()) if isinstance(x, Tensor) else type(x) for x in values}
        wanted = f"{name!r} of one type and number of dimensions for every sample"
        require(len(alike) == 1 and isinstance(values[0], Tensor), "processor", wanted, alike)
        dim = next((_DIMS[kind, name] for kind in kinds if (kind, name) in _DIMS), 0)
        merged[name] = _joined(values, dim)
    return merged


def check_merged(processor: Any, merged: Mapping[str, Any], called: Mapping[str, Any]) -> None:
    """Refuse a processor that makes another thing of samples together than of each alone.

    Args:
        processor: of a model.
        merged: of `merge_features`.
        called: what one call for the same samples, each with images, returned.

    Raises:
        ValueError: they differ.
    """
    wanted = "one whose features of images are those of each sample, one behind the other"
    kind = type(processor).__name__
    for name in dict.fromkeys((*called, *merged)):
        one, other = called.get(name), merged.get(name)
        if not _same(one, other):
            got = f"{kind}, whose {name!r} is {_shown(one)} and not {_shown(other)} (no packing)"
            fail("processor", wanted, got)


def check_of_images(features: Mapping[str, Any], tokens: int) -> None:
    """Refuse a feature that runs along with the tokens of a sample, which rows would not move.

    Args:
        features: of one sample, without what the collator knows to run along.
        tokens: of the sample, before truncation.

    Raises:
        ValueError: there is one.
    """
    for name, x in features.items():
        if isinstance(x, Tensor) and x.shape[:2] == (1, tokens):
            fail("processor", "features of images (no packing)", f"{name!r} of each token")


def _joined(values: list[Tensor], dim: int) -> Tensor:
    """One behind the other along `dim`; others are padded at their end with 0."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in values))]
    shape[dim] = sum(x.shape[dim] for x in values)
    out, start = values[0].new_zeros(shape), 0
    for x in values:
        out.narrow(dim, start, x.shape[dim])[tuple(map(slice, x.shape))] = x
        start += x.shape[dim]
    return out


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return f"a list of {len(x)}" if isinstance(x, list) else repr(x)
