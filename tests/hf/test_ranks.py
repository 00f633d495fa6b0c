"""DDP, FSDP2 and DeepSpeed ZeRO-3 on two CPU processes: losses and gradients of one process."""

from __future__ import annotations

import pytest
import torch

from tests.hf.closeness import assert_same_gradients
from tests.hf.launching import deepspeed, run
from tests.hf.ranks import CASES, LEFT_OUT, one_process


@pytest.fixture(scope="module")
def ddp_and_fsdp2(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run("-m", "tests.hf.ranks", str(folder), "ddp", "fsdp2")
    return {name: torch.load(folder / f"{name}.pt") for name in ("ddp", "fsdp2", "adapter")}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("zero3")
    run("-m", "tests.hf.ranks", str(folder), "zero3", **deepspeed())
    return {"zero3": torch.load(folder / "zero3.pt")}


@pytest.fixture(scope="module")
def alone() -> dict:
    return {name: one_process(case) for name, case in CASES.items()}


def assert_equal(results: dict, alone: dict, strategy: str) -> None:
    assert results[strategy].keys() == CASES.keys() - LEFT_OUT.get(strategy, set())
    for name, (loss, gradients) in results[strategy].items():
        torch.testing.assert_close(loss, alone[name][0], rtol=1e-5, atol=0, msg=name)
        assert_same_gradients(gradients, alone[name][1], share=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(ddp_and_fsdp2, alone, strategy):
    assert_equal(ddp_and_fsdp2, alone, strategy)


def test_learned_head_weights_beside_a_sharded_adapter_are_saved(ddp_and_fsdp2):
    found = ddp_and_fsdp2["adapter"]
    weight = found["weight"]
    assert torch.equal(weight.flatten(), torch.arange(weight.numel(), dtype=weight.dtype))
    assert bool(found["skipped"])


def test_two_ranks_of_zero3_equal_one_process(zero3, alone):
    assert_equal(zero3, alone, "zero3")
