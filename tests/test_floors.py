"""The models of work and memory: against arithmetic by hand, and memory against a measurement."""

import gc
import json
from itertools import accumulate

import pytest
import torch

from benchmarks.floors import (
    H200,
    Head,
    engine_flops,
    extra_bytes,
    floor_bytes,
    floor_flops,
    moved_bytes,
    seconds,
)
from groundkern import available_backends, linear_cross_entropy, row_blocks


def test_floor_of_a_large_batch() -> None:
    head = Head(4096, 4096, 128256)
    assert floor_flops(head) == 3 * 2 * 4096 * 4096 * 128256
    assert engine_flops(head) == floor_flops(head) * 4 // 3
    assert seconds(floor_flops(head), floor_bytes(head), H200) == floor_flops(head) / 989e12


def test_few_rows_are_bound_by_reading_the_weight() -> None:
    head = Head(137, 2048, 151936)
    weight = 2 * 2048 * 151936
    assert floor_bytes(head) == 3 * weight + 2 * 2 * 137 * 2048
    assert seconds(floor_flops(head), floor_bytes(head), H200) == floor_bytes(head) / 4.8e12


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 137, 1024, 16384])
def test_the_engine_does_no_less_than_the_floor(rows: int, trained: bool) -> None:
    head = Head(rows, 3584, 152064, trained=trained)
    assert moved_bytes(head) > floor_bytes(head)
    frozen = Head(rows, 3584, 152064, trained=False)
    assert engine_flops(frozen) == 3 * floor_flops(frozen) // 2


def test_memory_is_the_budget_and_the_gradients_whatever_the_rows() -> None:
    for rows in (4096, 16384, 65536):
        head = Head(rows, 2048, 151936)
        gradients = 6 * 2048 * (151936 + rows)
        assert extra_bytes(head) <= row_blocks.LOGIT_BYTES + gradients


@pytest.mark.skipif(available_backends()["triton"] is not None, reason="needs the triton package")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("budget", [2**19, 2**30])
def test_memory_matches_a_measurement(budget: int, trained: bool, tmp_path, monkeypatch) -> None:
    """fp32 in the interpreter on CPU tensors: peak of torch's allocator within 5 %."""
    monkeypatch.setattr(row_blocks, "LOGIT_BYTES", budget)
    head = Head(48, 16, 9000, itemsize=4, trained=trained)
    hidden = torch.randn(head.rows, head.dim, requires_grad=True)
    weight = torch.randn(head.vocabulary, head.dim, requires_grad=trained)
    target = torch.randint(head.vocabulary, (head.rows,))

    def step() -> None:
        linear_cross_entropy(hidden, weight, target, backend="triton").loss.backward()
        hidden.grad = weight.grad = None

    step()
    gc.collect()  # the interpreter leaves cycles; freed below, they would count as negative
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = [e for e in events if e["name"] == "[memory]"]
    memory.sort(key=lambda e: e["ts"])
    peak = max(accumulate(e["args"]["Bytes"] for e in memory))
    assert peak == pytest.approx(extra_bytes(head), rel=0.05)
