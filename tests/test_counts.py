"""The guard on counts: what the CPU calls cost now against what is committed."""

import shutil

import pytest
import torch

from benchmarks import counts, harness
from groundkern import available_backends

native = pytest.mark.skipif(
    available_backends()["native"] is not None, reason="the native kernels are not built"
)


def committed(instructions: bool) -> dict[str, dict[str, int]]:
    return {n: x for n, x in counts.committed().items() if ("instructions" in x) == instructions}


@native
def test_no_call_costs_more_than_the_committed_counts() -> None:
    worse, _ = counts.changes(counts.now(), committed(instructions=False))
    assert not worse


@native
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind (Debian: valgrind)")
def test_no_kernel_takes_more_instructions_than_committed() -> None:
    worse, _ = counts.changes(counts.instructions(), committed(instructions=True))
    assert not worse


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
    run, _ = harness.runner(call, harness.ours(call, "reference"), "forward")
    assert counts.product_flops(run) == problem.floor("forward").flops


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
