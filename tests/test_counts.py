"""The guard on counts: what calls cost now, compared with what is committed."""

import importlib.util
import shutil
from collections import Counter

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import admission
from benchmarks.counts import counting as counts
from groundkern import available_backends
from groundkern.ops.cases import Call

native = pytest.mark.skipif(
    available_backends()["native"] is not None, reason="the native kernels are not built"
)


triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def committed(kind: str) -> dict[str, dict[str, int]]:
    """kind: "" for the CPU's, "counted" for instructions, "gpu" for launches."""
    of = {n: n.split("/")[0] for n in counts.committed()}
    kinds = {n: k if k in ("counted", "gpu") else "" for n, k in of.items()}
    return {n: x for n, x in counts.committed().items() if kinds[n] == kind}


@pytest.mark.long
@native
def test_no_call_costs_more_than_the_committed_counts() -> None:
    worse, _ = counts.changes(counts.now(), committed(""))
    assert not worse


@pytest.mark.long
@native
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind (Debian: valgrind)")
def test_no_kernel_takes_more_instructions_than_committed() -> None:
    worse, _ = counts.changes(counts.instructions(), committed("counted"))
    assert not worse


@triton
def test_no_call_launches_more_than_committed() -> None:
    worse, _ = counts.changes(counts.launches(), committed("gpu"))
    assert not worse


@triton
def test_kernels_of_torch_operators_are_counted() -> None:
    """One for an operator, none for views and allocations, logsumexp's own nine; GEMMs apart."""
    from benchmarks.launches.kernels import torch_kernels
    from benchmarks.launches.recording import GPU, recording

    with recording() as seen:
        x = torch.empty(8, 4, device=GPU)
        assert x.is_cuda and x.to(GPU).device == GPU
        x[2:].t().expand(2, 4, 6)
        x.t().reshape(32)
        x.sum(0, dtype=torch.float64) + 1
        x @ x.t()
        torch.mm(x, x.t(), out=x.new_empty(8, 8))
        x.logsumexp(0)
        torch.where(x > 0, x, 0.0)
    assert seen.gemms == ["mm", "mm"] and not seen.triton
    one_each = ["copy_", "sum", "add", "gt", "scalar_tensor", "where"]
    logsumexp = ["amax", "abs", "eq", "masked_fill_", "sub", "exp_", "sum", "log_", "add_"]
    assert torch_kernels(seen.operators) == Counter(one_each + logsumexp)


@triton
@pytest.mark.parametrize("wait", [Tensor.tolist, Tensor.item, Tensor.nonzero, bool])
def test_a_host_that_waits_cannot_be_counted(wait) -> None:
    from benchmarks.launches.recording import GPU, recording

    with recording():
        x = torch.empty(1, device=GPU)
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait(x)


@triton
def test_what_the_first_call_alone_launches_is_told_apart() -> None:
    from benchmarks.launches import counting
    from benchmarks.launches.recording import GPU

    def planned(plan: list[Tensor], x: Tensor) -> tuple[Tensor]:
        if not plan:
            plan.append(x.detach().exp())
        return (x * plan[0],)

    found = counting.count(lambda: Call(planned, {"x": torch.empty(3, device=GPU)}, {"plan": []}))
    assert {way: dict(kernels.torch) for way, kernels in found.items()} == {
        "first forward": {"exp": 1, "mul": 1},
        "forward": {"mul": 1},
        "backward": {"mul": 1},
    }


@native
@pytest.mark.parametrize("problem", [p for p in counts.cases() if p.op == "linear_cross_entropy"],
                         ids=lambda p: p.key)  # fmt: skip
def test_the_committed_products_are_the_floor(problem) -> None:
    """Two products with a frozen head, three with a trained one, on counted rows only."""
    assert counts.committed()[problem.key]["flops"] == problem.floor("full").flops


def test_products_inside_an_op_are_counted() -> None:
    x, y = torch.randn(3, 5), torch.randn(5, 7)
    assert counts.product_flops(lambda: x @ y) == 2 * 3 * 5 * 7
    problem = next(p for p in counts.cases() if p.op == "linear_cross_entropy")
    call = problem.make(torch.device("cpu"))
    run, _ = admission.runner(call, admission.ours(call, "reference"), "forward")
    assert counts.product_flops(run) == problem.floor("forward").flops


@pytest.mark.parametrize("multiplies", [True, False])
def test_what_depends_on_the_processor_is_compared_on_its_own(multiplies, monkeypatch) -> None:
    monkeypatch.setattr(counts, "multiplies_bf16", lambda: multiplies)
    name = "issue-5/linear_cross_entropy_trained/N512xV32768/bfloat16"
    old, more = {"flops": 10, "bytes": 10}, {"flops": 11, "bytes": 30}
    worse, _ = counts.changes({name: more}, {name: old})
    assert [f"{name}: bytes 10 -> 30"] * multiplies == worse[:-1]
    assert worse[-1] == f"{name}: flops 10 -> 11"
    for other in (name.replace("bfloat16", "float32"), "issue-5/side_attention/S4096xN64/bfloat16"):
        assert len(counts.changes({other: more}, {other: old})[0]) == 2


def test_more_fails_and_fewer_is_told() -> None:
    old = {"a": {"flops": 100, "bytes": 100}, "gone": {"flops": 1, "bytes": 1}}
    new = {"a": {"flops": 101, "bytes": 80}, "new": {"flops": 1, "bytes": 1}}
    worse, better = counts.changes(new, old)
    assert worse == [
        "a: flops 100 -> 101",
        "gone: bytes 1 -> None",
        "gone: flops 1 -> None",
        "new: bytes None -> 1",
        "new: flops None -> 1",
    ]
    assert better == ["a: bytes 100 -> 80"]
    assert counts.changes({"a": {"flops": 100, "bytes": 109}}, {"a": old["a"]}) == ([], [])
