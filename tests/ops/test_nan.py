"""NaN in an input or in a gradient from above reaches what depends on it: a backend that leaves it
out would hide that a training run has diverged."""

from dataclasses import replace

import pytest
import torch

from groundkern.ops.attention_map import cases as maps
from groundkern.ops.side_attention import cases as side
from tests.ops.test_contract import CPU, SERVED

CASES = {f"side_attention/{name}": make for name, make in side.CASES.items()}
CASES |= {f"attention_map/{name}": make for name, make in maps.CASES.items()}
SOME = (
    "side_attention/regions",
    "side_attention/main_statistics",
    "attention_map/map_visible_sets_weights",
    "attention_map/kl_visible_mean",
    "attention_map/kl_columns_mean",
    "attention_map/kl_columns_each",
    "attention_map/contribution_columns",
)
BACKENDS = sorted({backend for _, backend in SERVED})


def _run(case: str, backend: str, where: str) -> tuple[torch.Tensor, ...]:
    """Result, and the gradients of q and k, with one NaN in an input or the upstream gradient."""
    call = CASES[case](torch.float32, CPU)
    inputs = {name: x.detach().clone() for name, x in call.inputs.items()}
    row = 1  # has keys, and columns of its own
    if where == "q":
        inputs["q"][row, 0, 0] = torch.nan
    elif where == "k":
        inputs["k"][:, 0, :, 0] = torch.nan
    leaves = {n: x.requires_grad_(n not in call.fixed) for n, x in inputs.items()}
    result = replace(call, inputs=leaves).run(backend=backend)[0]
    upstream = torch.ones_like(result)
    if where == "upstream":
        upstream[row] = torch.nan
    return result[row], *torch.autograd.grad(result, [leaves["q"], leaves["k"]], upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("where", ["q", "k", "upstream"])
def test_nan_is_not_left_out(case: str, backend: str, where: str) -> None:
    result, dq, dk = _run(case, backend, where)
    if where != "upstream":
        assert result.isnan().any(), "the result of the row"
    assert dq[1, 0].isnan().any(), "the query's gradient"
    assert dk.isnan().any(), "the gradient of its keys"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["kl_visible_mean", "map_visible_sets_weights"])
def test_a_given_lse_of_nan_is_not_left_out(kind: str, trained: bool, backend: str) -> None:
    call = maps.CASES[kind](torch.float32, CPU)
    q = call.inputs["q"]
    lse = torch.ones(q.shape[:2])
    lse[1, 0] = torch.nan
    inputs = {**call.inputs, "q": q.detach().clone().requires_grad_()}
    lse.requires_grad_(trained)
    result = replace(call, inputs=inputs).run(backend=backend, lse=lse)[0]
    assert result[1].isnan().any() and not result[0].isnan().any()
    (dq,) = torch.autograd.grad(result, inputs["q"], torch.rand_like(result) + 0.5)
    assert dq[1, 0].isnan().any() and not dq[0].isnan().any()
