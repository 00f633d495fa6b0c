"""docs/training.md: its code runs as it stands, and its loop equals GroundingTrainer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from groundkern.hf import detach
from tests.hf.collating import make_example, make_region
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.tiny import tiny_qwen_model, tiny_qwen_processor
from tests.hf.training import attached_model, train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ATTACH, TRAINER, TRL, LOOP = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the page takes for granted, with its first block run."""
    monkeypatch.chdir(tmp_path)
    answer = "the red patch"
    region = make_region(answer, "red patch")
    names = {
        "model": tiny_qwen_model(),
        "processor": tiny_qwen_processor(),
        "examples": [make_example(answer, regions=[region], name=f"{i}") for i in range(4)],
    }
    exec(ATTACH, names)
    yield names
    detach(names["model"])


def test_the_trainer_runs(names):
    exec(TRAINER, names)
    log = names["trainer"].state.log_history
    assert log[-1]["train_loss"] > 0
    assert names["trainer"].state.global_step == 2


def test_sft_trainer_runs(names):
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    exec(TRL, names)
    assert names["trainer"].state.global_step == 2


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4)], ids=["4", "1 + 3"])
def test_the_loop_equals_the_trainer(tmp_path, cuts):
    names: dict = {}
    exec(LOOP, names)
    log, wanted = train(tmp_path, max_steps=2, learning_rate=0.002, max_grad_norm=0.0)
    model = attached_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    batches = [make_batch(model, SAMPLES["qwen"][a:b]) for a, b in pairwise(cuts)]
    for line in log[:2]:
        for name, part in names["train_step"](model, optimizer, batches).items():
            assert float(part) == pytest.approx(line[name], rel=2e-5), name
    detach(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-5)


def test_the_launch_files_are_there_and_read():
    for file in re.findall(r"examples/accelerate/\w+\.yaml", TEXT):
        assert yaml.safe_load((ROOT / file).read_text())["num_processes"] == 2
