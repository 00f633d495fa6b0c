"""Every op's cases and edges on a GPU: many small calls (test_gpu.py has few, of real size)."""

import pytest
import torch

from groundkern import set_logit_budget
from tests.ops.edges import EDGES, SOME
from tests.ops.on_gpu import CUDA
from tests.ops.test_contract import BESIDES, CASES, TRITON_CALLS, hold

pytestmark = pytest.mark.gpu

# Most of the time is spent compiling about six kernels a call, so only bf16 runs everything.
# fp32's kernels have tiles and dots of their own; fp16's differ from bf16's in the dtype alone.
CALLS = {**CASES, **EDGES}
OWN = [
    *CASES,
    *(
        name
        for name in EDGES
        if name.endswith(("/unaligned", *(f"{f}/dims_256_256" for f in SOME)))
    ),
]
CHOSEN = {
    torch.bfloat16: list(CALLS),
    torch.float32: OWN,
    torch.float16: [name for name in CASES if name in TRITON_CALLS or name.startswith("linear")],
}
PARAMETERS = [
    pytest.param(name, dtype, id=f"{dtype}-{name}")
    for dtype, names in CHOSEN.items()
    for name in names
]


@pytest.mark.parametrize(("name", "dtype"), PARAMETERS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    # Cases are held to the rule alone, as on CPU; an edge has too few numbers for that.
    hold(CALLS[name](dtype, CUDA), "triton", dtype, BESIDES if name in EDGES else 0.0)


@pytest.mark.parametrize("name", ["loss/odd", "loss/one_row_none", "log_prob/one_row"])
def test_chunks_of_one_row(name: str) -> None:
    set_logit_budget(1)
    try:
        hold(EDGES[name](torch.bfloat16, CUDA), "triton", torch.bfloat16, BESIDES)
    finally:
        set_logit_budget(None)
