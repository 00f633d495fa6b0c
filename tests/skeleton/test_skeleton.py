"""What tests/ops/test_contract.py asks of every op, of the one that newcomers copy."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from groundkern import available_backends
from tests.closeness import GRADIENTS, VALUES, assert_close
from tests.ops.test_contract import CPU, differentiate
from tests.skeleton.api import scaled_rows
from tests.skeleton.cases import CASES

BACKENDS = [name for name in ("reference", "triton") if available_backends()[name] is None]
served = pytest.mark.parametrize(("case", "backend"), list(product(CASES, BACKENDS)))


def naive(x: Tensor, factor: Tensor, scale: float | None = None) -> Tensor:
    return (scale or 1.0) * factor[:, None].to(x.dtype) * x


def make(case: str, backend: str, dtype: torch.dtype = torch.float32):
    call = CASES[case](dtype, CPU)
    return replace(call, options={**call.options, "backend": backend})


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(case: str, backend: str, dtype: torch.dtype) -> None:
    ours, our_gradients = differentiate(make(case, backend, dtype))
    call = CASES[case](dtype, CPU)
    plain, plain_gradients = differentiate(call, naive)
    truth, true_gradients = differentiate(call, naive, torch.float64)
    for i, results in enumerate(zip(ours, plain, truth, strict=True)):
        assert_close(f"result {i}", *results, VALUES)
    gradients = zip(call.inputs, our_gradients, plain_gradients, true_gradients, strict=True)
    for name, *tensors in gradients:
        assert_close(f"d{name}", *tensors, GRADIENTS)


@served
def test_opcheck_and_compile(case: str, backend: str) -> None:
    call = make(case, backend)
    inputs = [x.requires_grad_() for x in call.inputs.values()]
    scale = call.options.get("scale", 1.0)
    opcheck(torch.ops.groundkern_skeleton.scaled_rows.default, (*inputs, scale, backend))
    torch.compiler.reset()  # else the cases count as recompilations of one function
    compiled = torch.compile(scaled_rows, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call.run(compiled)[0], call.run()[0], rtol=0, atol=0)


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match="`backend`: expected one that serves this call"):
        scaled_rows(torch.ones(2, 3), torch.ones(2), backend="native")
    assert scaled_rows(torch.ones(2, 3), torch.ones(2)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("changed", "kind", "name"),
    [
        ({"factor": torch.ones(3)}, ValueError, "factor"),
        ({"factor": torch.ones(2, dtype=torch.float16)}, TypeError, "factor"),
        ({"x": torch.ones(2)}, ValueError, "x"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_bad_input_is_one_clear_error(changed: dict, kind: type[Exception], name: str) -> None:
    with pytest.raises(kind, match=f"^`{name}`: expected"):
        scaled_rows(**({"x": torch.ones(2, 3), "factor": torch.ones(2)} | changed))
