"""Edge sizes and layouts on every backend here; under Triton's interpreter a few of them."""

import pytest
import torch

from groundkern import set_logit_budget
from tests.ops.edges import EDGES
from tests.ops.test_contract import BACKENDS, BESIDES, CPU, DTYPES, hold, oracles_of

# The interpreter is slow, so it runs these alone, in fp32. tests/ops/test_gpu_wide.py runs all.
# dims_256_256: sums of 256 columns are stored a quarter at a time.
TRITON = ("ones", "odd", "unaligned", "nothing_visible", "one_row", "dims_256_256")
PARAMETERS = [
    pytest.param(edge, backend, dtype, id=f"{dtype}-{edge}-{backend}")
    for edge in EDGES
    for dtype in DTYPES[:2]
    for backend in BACKENDS
    if backend != "triton" or (edge.endswith(TRITON) and dtype == torch.float32)
]


@pytest.mark.parametrize(("edge", "backend", "dtype"), PARAMETERS)
def test_values_and_gradients(edge: str, backend: str, dtype: torch.dtype) -> None:
    make = EDGES[edge]
    hold(make(dtype, CPU), backend, dtype, BESIDES, oracles_of(make, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edge", ["loss/odd", "log_prob/one_row"])
def test_chunks_of_one_row(edge: str, backend: str) -> None:
    set_logit_budget(1)
    try:
        hold(EDGES[edge](torch.float32, CPU), backend, torch.float32, BESIDES)
    finally:
        set_logit_budget(None)
