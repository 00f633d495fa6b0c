"""Edge sizes and layouts on every backend here; Triton's interpreter takes a few of them."""

import pytest
import torch

from groundkern import set_logit_budget
from tests.ops.edges import EDGES
from tests.ops.test_contract import BACKENDS, CPU, DTYPES, hold

# Slow in the interpreter: one of each kind.
TRITON = ("ones", "odd", "unaligned", "nothing_visible", "one_row", "dims_192_128")


def _tried(edge: str, backend: str) -> bool:
    return backend != "triton" or edge.split("/")[1] in TRITON


each = pytest.mark.parametrize(
    ("edge", "backend"), [(e, b) for e in EDGES for b in BACKENDS if _tried(e, b)]
)


@each
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_values_and_gradients(edge: str, backend: str, dtype: torch.dtype) -> None:
    hold(EDGES[edge](dtype, CPU), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edge", ["loss/odd", "log_prob/one_row"])
def test_chunks_of_one_row(edge: str, backend: str) -> None:
    set_logit_budget(1)
    try:
        hold(EDGES[edge](torch.float32, CPU), backend, torch.float32)
    finally:
        set_logit_budget(None)
