"""FSDP2 and ZeRO-3 by accelerate: a run goes on where it stopped, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.hf.launching import accelerate_launch, deepspeed, run
from tests.hf.resuming import make_model, trainer_of, weights
from tests.hf.resuming import run as run_alone

FSDP2, SHARDED, ZERO3 = "fsdp2", "fsdp2 in shards", "zero3"


def launch(strategy: str, folder: Path, *words: str, processes: int = 2) -> None:
    """`tests.hf.resuming` under a strategy."""
    environment = deepspeed() if strategy == ZERO3 else {}
    config = "zero3" if strategy == ZERO3 else "fsdp2"
    launcher = accelerate_launch(config, processes)
    if strategy == SHARDED:
        at = launcher.index("--config_file")
        flag = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
        launcher = (*launcher[:at], *flag, *launcher[at:])
    run("tests.hf.resuming", str(folder), *words, launcher=launcher, **environment)


def assert_same(kind: str, folder: Path, wanted: Path, *, bits: bool) -> None:
    found, wanted = weights(kind, folder / "end"), weights(kind, wanted / "end")
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        tolerance = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found[name], x, msg=name, **tolerance)


@pytest.fixture(scope="module", params=[pytest.param("full", marks=pytest.mark.long), "lora"])
def kind(request) -> str:
    """The quick one is LoRA, since most of its checkpoint is not in FSDP's own state."""
    return request.param


@pytest.fixture(scope="module")
def alone(kind, tmp_path_factory) -> Path:
    """A run by one process."""
    root = tmp_path_factory.mktemp("alone")
    run_alone(make_model(kind), root / kind, world=1)
    return root


@pytest.fixture(scope="module")
def shards(kind, tmp_path_factory) -> Path:
    """A run on two ranks of FSDP2, whole and from its second step on."""
    root = tmp_path_factory.mktemp("shards")
    launch(SHARDED, root, kind, "two")
    return root


def test_fsdp2_resumes_bit_by_bit_and_equals_one_process(shards, alone, kind):
    assert_same(kind, shards / kind / "two", alone / kind, bits=False)
    assert_same(kind, shards / kind / "two-again", shards / kind / "two", bits=True)


def test_one_process_goes_on_from_fsdp2(shards, alone, kind, tmp_path):
    """Weights, the optimizer's state and what is beside an adapter, out of shards."""
    run_alone(make_model(kind, seed=9), tmp_path, world=1, start=shards / kind / "two")
    assert_same(kind, tmp_path, alone / kind, bits=False)


def test_sharded_ranks_do_not_start_from_other_forms(alone, kind, tmp_path, monkeypatch):
    """Each rank says so; none waits for one that failed."""
    trainer = trainer_of(make_model(kind), tmp_path, world=1)
    monkeypatch.setattr(trainer, "_form", lambda: "FSDP")
    with pytest.raises(ValueError, match=r"a checkpoint of FSDP.*got one of a run without"):
        trainer.train(str(alone / kind / "checkpoint-2"))


@pytest.mark.long
@pytest.mark.parametrize("strategy", [FSDP2, SHARDED, ZERO3])
def test_every_strategy_resumes_on_any_number_of_ranks(alone, kind, tmp_path, strategy):
    launch(strategy, tmp_path, kind, "two")
    launch(strategy, tmp_path, kind, "four", "two", processes=4)
    home = tmp_path / kind
    assert_same(kind, home / "two", alone / kind, bits=False)
    assert_same(kind, home / "two-again", home / "two", bits=True)
    assert_same(kind, home / "four", alone / kind, bits=False)


@pytest.mark.long
@pytest.mark.parametrize("strategy", [ZERO3, FSDP2])
def test_trainer_on_two_sharded_ranks_equals_one_process(tmp_path, strategy):
    """The log's parts, the held-out means and the refused term norms (tests.hf.training)."""
    from tests.hf.training import PARTS, attached_model, make_trainer

    environment = deepspeed() if strategy == ZERO3 else {}
    run("tests.hf.training", str(tmp_path), launcher=accelerate_launch(strategy), **environment)
    found = json.loads((tmp_path / "log.json").read_text())
    one = make_trainer(attached_model(), tmp_path, max_steps=2)
    one.train()
    for ours, theirs in zip(found["log"][:2], one.state.log_history, strict=False):
        for name in ("loss", "grad_norm", *PARTS):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    held_out = one.evaluate()
    for name in ("loss", *PARTS, "token_accuracy", "word_accuracy"):
        wanted = pytest.approx(held_out[f"eval_{name}"], rel=1e-4)
        assert found["held_out"][f"eval_{name}"] == wanted, name
