"""The attention ops at real sizes on a GPU: values, gradients, given statistics, torch.compile."""

import pytest
import torch
from torch import Tensor

from groundkern import attention_kl, attention_map, side_attention
from tests.ops import on_gpu
from tests.ops.on_gpu import compare, large

pytestmark = pytest.mark.gpu

ROWS = (1, 8, 64, 256)
# bf16 at every size; for the other dtypes, which compile to other kernels, one size is enough.
SIZES = [
    *(pytest.param(torch.bfloat16, s, n, id=f"{s}-{n}") for s in (4096, 32768) for n in ROWS),
    *(pytest.param(torch.bfloat16, 131072, n, id=f"131072-{n}", marks=large) for n in ROWS),
    *(pytest.param(t, 4096, 64, id=f"{t}-4096-64") for t in (torch.float16, torch.float32)),
]
each_size = pytest.mark.parametrize(("dtype", "keys", "n"), SIZES)


@each_size
@pytest.mark.parametrize("sets", [False, True], ids=["visible", "regions"])
def test_side_attention(sets: bool, dtype: torch.dtype, keys: int, n: int) -> None:
    options = {"rows": on_gpu.attention_rows(keys, n)}
    options["allowed"] = on_gpu.regions(keys, n) if sets else None
    inputs = on_gpu.attention_inputs(dtype, keys, n)
    compare(side_attention, on_gpu.plain_side, inputs, options)


@each_size
@pytest.mark.parametrize("over", ["visible", "columns"])
def test_attention_map(over: str, dtype: torch.dtype, keys: int, n: int) -> None:
    inputs = on_gpu.attention_inputs(dtype, keys, n, "qk")
    compare(attention_map, on_gpu.plain_map, inputs, on_gpu.map_options(keys, n, over))


@each_size
@pytest.mark.parametrize("over", ["visible", "columns"])
def test_attention_kl(over: str, dtype: torch.dtype, keys: int, n: int) -> None:
    inputs = on_gpu.attention_inputs(dtype, keys, n, "qk")
    inputs["target"] = torch.rand(n, on_gpu.COLUMNS, device=on_gpu.CUDA)
    compare(attention_kl, on_gpu.plain_kl, inputs, on_gpu.map_options(keys, n, over))


@pytest.mark.parametrize("shift", [0.0, 200.0], ids=["as it is", "every sum underflows"])
def test_given_statistics_never_change_the_result(shift: float) -> None:
    keys, n = 4096, 64
    inputs = on_gpu.attention_inputs(torch.bfloat16, keys, n)
    rows = on_gpu.attention_rows(keys, n)
    lse = side_attention(**inputs, rows=rows, backend="triton").lse + shift
    options = {"rows": rows, "allowed": on_gpu.regions(keys, n)}
    compare(side_attention, on_gpu.plain_side, inputs, options, lse=lse)


def test_compiled_equals_eager() -> None:
    inputs = on_gpu.attention_inputs(torch.bfloat16, 4096, 8)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    options = {"rows": on_gpu.attention_rows(4096, 8), "allowed": on_gpu.regions(4096, 8)}

    def step(function) -> tuple[Tensor, ...]:
        results = function(**leaves, **options, backend="triton")
        gradients = torch.autograd.grad(results.out.float().square().sum(), list(leaves.values()))
        return (*results, *gradients)

    torch._dynamo.reset()
    compiled = torch.compile(side_attention, fullgraph=True)
    for a, b in zip(step(side_attention), step(compiled), strict=True):
        assert torch.equal(a, b)
