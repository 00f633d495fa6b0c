"""What maps hold between kernels: [N, C] and [N, Hq], never [N, Hq, C]."""

from pathlib import Path

import pytest
import torch

from groundkern import (
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    available_backends,
)
from tests.allocations import allocations

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

N, HEADS, KEYS, COLUMNS, DIM = 3, 8, 130, 128, 8


def _largest(folder: Path, function, over: str, backend: str, **options) -> int:
    """Bytes of the largest allocation of a forward and backward."""
    rows = QueryRows.causal(torch.zeros(N, dtype=torch.int32), torch.full((N,), KEYS - 1))
    columns = torch.arange(COLUMNS, dtype=torch.int32)[None]
    tensors = [torch.randn(N, HEADS, DIM), torch.randn(1, 1, KEYS, DIM)]
    if function is attention_contribution:
        tensors += [torch.randn(1, 1, KEYS, DIM), torch.randn(N, HEADS, DIM)]
    tensors = [x.requires_grad_() for x in tensors]
    if function is attention_kl:
        tensors.append(torch.rand(N, COLUMNS))

    def step() -> None:
        result = function(*tensors, rows, columns, over=over, backend=backend, **options)
        result.square().sum().backward()

    return max(allocations(step, folder))


@pytest.mark.parametrize(
    ("function", "over", "options"),
    [
        (attention_map, "visible", {}),
        (attention_contribution, "columns", {"rectify": True}),
        (attention_kl, "visible", {"heads": "mean"}),
        (attention_kl, "columns", {"heads": "each"}),
    ],
    ids=["map", "contribution", "kl_mean", "kl_each"],
)
def test_nothing_as_large_as_the_columns_of_all_heads(function, over, options, tmp_path) -> None:
    size = torch.float32.itemsize * N * HEADS * COLUMNS
    assert _largest(tmp_path, function, over, "triton", **options) < size
    assert _largest(tmp_path, function, over, "reference", **options) >= size, "the count sees it"
