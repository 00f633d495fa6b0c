"""DDP, FSDP2 and DeepSpeed ZeRO-3 on two CPU processes: losses and gradients of one process."""

from __future__ import annotations

import pytest
import torch

from tests.hf.closeness import assert_same_gradients
from tests.hf.launching import FORKED, deepspeed, deepspeed_if_installed, run
from tests.hf.ranks import CASES, cases_of, one_process


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Of every strategy, in one launch; without ZeRO-3 where there is no DeepSpeed."""
    folder, environment = tmp_path_factory.mktemp("ranks"), deepspeed_if_installed()
    strategies = ["ddp", "fsdp2"] + ([] if environment is None else ["zero3"])
    run("tests.hf.ranks", str(folder), *strategies, launcher=FORKED, **(environment or {}))
    return {name: torch.load(folder / f"{name}.pt") for name in (*strategies, "adapter")}


@pytest.fixture(scope="module")
def alone() -> dict:
    return {name: one_process(case) for name, case in CASES.items()}


def assert_equal(results: dict, alone: dict, strategy: str) -> None:
    assert results[strategy].keys() == cases_of(strategy)
    for name, (loss, gradients) in results[strategy].items():
        torch.testing.assert_close(loss, alone[name][0], rtol=1e-5, atol=0, msg=name)
        assert_same_gradients(gradients, alone[name][1], share=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_equal_one_process(found, alone, strategy):
    if strategy not in found:
        pytest.skip("DeepSpeed is not installed")
    assert_equal(found, alone, strategy)


@pytest.mark.long
def test_more_of_zero3(alone, tmp_path):
    run("tests.hf.ranks", str(tmp_path), "zero3 long", launcher=FORKED, **deepspeed())
    assert_equal({"zero3 long": torch.load(tmp_path / "zero3 long.pt")}, alone, "zero3 long")


def test_learned_head_weights_beside_a_sharded_adapter_are_saved(found):
    adapter = found["adapter"]
    weight = adapter["weight"]
    assert torch.equal(weight.flatten(), torch.arange(weight.numel(), dtype=weight.dtype))
    assert bool(adapter["skipped"])
