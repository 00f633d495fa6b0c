"""docs/trainers/torchtune.md: its recipe runs as it stands, and a step is not how it was cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import detach
from tests.hf.collating import make_example, make_region

TEXT = (Path(__file__).parents[2] / "docs" / "trainers" / "torchtune.md").read_text("utf-8")
RECIPE, RUN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ANSWERS = ("the red patch", "it is the red patch of row 2", "red patch", "no, the red patch")


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [
        make_example(answer, [make_region(answer, "red patch")], name=str(i))
        for i, answer in enumerate(ANSWERS)
    ]
    found = {"examples": examples, "model": tiny_qwen_model(), "processor": tiny_qwen_processor()}
    exec(RECIPE, found)
    yield found
    detach(found["model"])


def test_the_recipe_runs_and_goes_on(names, capsys):
    before = {name: x.clone() for name, x in names["model"].named_parameters()}
    exec(RUN, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["1", "2"]  # three micro-batches, then one
    assert all("map_kl: " in line for line in lines)
    first = names["recipe"]
    assert any(not torch.equal(x, before[n]) for n, x in first.model.named_parameters())
    again = type(first)({**first.cfg, "resume": True})
    again.setup(names["model"], names["processor"], names["examples"])
    assert again.steps_run == 2
    assert again.optimizer.state_dict()["state"][0]["step"] == 2


def test_a_step_is_not_how_it_was_cut(names):
    logs = []
    names["doctor"] = lambda *_: None  # the other test has it
    for size, pieces in ((4, 1), (1, 4), (3, 2)):
        names["model"] = tiny_qwen_model()
        recipe = names["GroundedFinetuneRecipe"](
            {
                "resume": False,
                "lr": 1e-3,
                "batch_size": size,
                "output_dir": ".",
                "clip_grad_norm": 1,
            }
            | {"gradient_accumulation_steps": pieces}
        )
        recipe.log = lambda step, parts: logs.append(parts)
        recipe.setup(names["model"], names["processor"], names["examples"])
        recipe.train()
    assert len(logs) == 3
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)


def test_the_recipe_has_the_methods_of_the_interface(names):
    """torchtune.recipe_interfaces.FTRecipeInterface of 0.6.1."""
    methods = ("load_checkpoint", "setup", "train", "save_checkpoint", "cleanup")
    assert all(callable(getattr(names["GroundedFinetuneRecipe"], name)) for name in methods)
