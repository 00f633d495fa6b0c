"""Every op's cases and edges on a GPU, in small: wide, where test_gpu.py is deep."""

import pytest
import torch

from groundkern import set_logit_budget
from tests.ops.edges import EDGES, SOME
from tests.ops.on_gpu import CUDA
from tests.ops.test_contract import BESIDES, CASES, hold

pytestmark = pytest.mark.gpu

# What is compiled costs most of the time here. bf16 comes first and has all; fp32 and fp16 have the
# ops' own cases, and of the edges one layout of each function.
OTHERS = (torch.float32, torch.float16)
CALLS = {**CASES, **EDGES}
PARAMETERS = [
    *(pytest.param(name, torch.bfloat16, id=f"bf16-{name}") for name in CALLS),
    *(pytest.param(name, dtype, id=f"{dtype}-{name}") for dtype in OTHERS for name in CASES),
    *(
        pytest.param(name, dtype, id=f"{dtype}-{name}")
        for dtype in OTHERS
        for name in EDGES
        if name.endswith(("/unaligned", *(f"{f}/dims_256_256" for f in SOME)))
    ),
]


@pytest.mark.parametrize(("name", "dtype"), PARAMETERS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    hold(CALLS[name](dtype, CUDA), "triton", dtype, BESIDES)


@pytest.mark.parametrize("name", ["loss/odd", "loss/one_row_none", "log_prob/one_row"])
def test_chunks_of_one_row(name: str) -> None:
    set_logit_budget(1)
    try:
        hold(EDGES[name](torch.bfloat16, CUDA), "triton", torch.bfloat16, BESIDES)
    finally:
        set_logit_budget(None)
