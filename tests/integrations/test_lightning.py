"""GroundingModule in Lightning's own Trainer against the bare loop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import Klal, attach, row_counts
from groundkern.integrations.lightning import GroundingModule, StepCollator
from tests.hf.collating import make_example, make_region
from tests.hf.samples import SAMPLES, make_batch
from tests.integrations.lightning_ranks import (
    OBJECTIVES,
    make_loader,
    make_module,
    make_trainer,
    sgd,
    weights,
)

ROOT = Path(__file__).parents[2]
QWEN = SAMPLES["qwen"]
PARTS = {"text", "smam_grounding", "smam_cross_entropy", "word", "map_kl"}


@pytest.fixture(scope="module")
def bare():
    """Two steps of the bare loop over pieces of three samples and of one: logs and weights."""
    model = attach(tiny_qwen_model(), **vars(OBJECTIVES)).train()
    optimizer = sgd(list(model.parameters()))
    logs = []
    for _ in range(2):
        pieces = [make_batch(model, QWEN[:3]), make_batch(model, QWEN[3:])]
        totals = sum(row_counts(piece) for piece in pieces)
        found = {}
        for piece in pieces:
            output = model(**piece, gk_totals=totals)
            output.loss.backward()
            for name, part in {"loss": output.loss, **output.parts}.items():
                found[name] = found.get(name, 0.0) + float(part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logs.append(found)
    return logs, {name: x.detach() for name, x in model.named_parameters()}


def assert_same(noted, found, bare):
    logs, wanted = bare
    assert len(noted) == len(logs) == 2
    for ours, theirs in zip(noted, logs):
        assert ours.keys() == theirs.keys() == {"loss", *PARTS}
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_two_steps_are_those_of_the_bare_loop(tmp_path, bare, size):
    module = make_module(examine=size == 3)
    make_trainer(tmp_path).fit(module, make_loader(module, size))
    assert_same(module.noted, weights(module), bare)


def test_a_run_goes_on_from_its_checkpoint(tmp_path, bare):
    first = make_module(examine=False)
    trainer = make_trainer(tmp_path, steps=1)
    trainer.fit(first, make_loader(first, 1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = make_module(examine=False)
    loader = make_loader(second, 1)
    make_trainer(tmp_path).fit(second, loader, ckpt_path=tmp_path / "one.ckpt")
    assert len(second.noted) == 1
    assert_same([*first.noted, *second.noted], weights(second), bare)


def test_validation_has_means_over_all_rows(tmp_path):
    """However the held-out set is cut into batches."""
    module = make_module(examine=False)
    found = []
    for size in (1, 4):
        collate = lambda samples: make_batch(module.model, tuple(samples))  # noqa: E731
        loader = DataLoader(list(QWEN), batch_size=size, collate_fn=collate)
        (means,) = make_trainer(tmp_path).validate(module, loader, verbose=False)
        found.append(means)
    assert {f"val_{name}" for name in ("loss", *PARTS)} <= found[0].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_term_without_rows_is_told(tmp_path, recwarn):
    module = make_module(examine=False)
    batch = make_batch(module.model, QWEN[:1])
    batch = {name: x for name, x in batch.items() if not name.startswith("gk_word")}
    loader = DataLoader([0, 1], collate_fn=lambda samples: [batch])
    make_trainer(tmp_path).fit(module, loader)
    said = [str(each.message) for each in recwarn if "in each of the first" in str(each.message)]
    assert len(said) == 1 and "`word`: 0 in each of the first 2 steps" in said[0]


def test_a_schedule_takes_a_step_with_each_of_the_optimizers(tmp_path):
    halves = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    module = make_module(examine=False, schedule=halves, max_grad_norm=None)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_loader(module, 2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 4)


def test_what_would_be_wrong_is_refused(tmp_path):
    module = make_module(examine=False)
    loader = make_loader(module, 1)
    with pytest.raises(ValueError, match="precision"):
        make_trainer(tmp_path, precision="bf16-true").fit(module, loader)
    plain = [{"input_ids": torch.zeros(1, 3, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"gk_text_position.*in 0 of 1"):
        make_trainer(tmp_path).fit(module, DataLoader([0], collate_fn=lambda _: plain))
    with pytest.raises(ValueError, match="attach"):
        GroundingModule(tiny_qwen_model(), sgd)
    with pytest.raises(ValueError, match="size"):
        StepCollator(lambda samples: samples, 0)
    with pytest.raises(Exception, match="accumulat"):  # Lightning's own words
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader)
    with pytest.raises(Exception, match="gradient clipping"):
        make_trainer(tmp_path, gradient_clip_val=1.0).fit(module, loader)


def test_the_model_trains_under_autocast(tmp_path):
    """`from_pretrained` leaves it in evaluation mode, and so does Lightning."""
    module = GroundingModule(attach(tiny_qwen_model().eval(), klal=Klal()), sgd, examine=False)
    seen = []
    module.model.model.register_forward_hook(
        lambda model, *_: seen.append((model.training, torch.is_autocast_enabled("cpu")))
    )
    make_trainer(tmp_path, steps=1, precision="bf16-mixed").fit(module, make_loader(module, 2))
    assert set(seen) == {(True, True)}


@pytest.mark.long
def test_two_processes_are_one(tmp_path, bare):
    """DDP over gloo: uneven rows, and parts and means over both processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "tests.integrations.lightning_ranks", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    assert_same(found["noted"], found["weights"], bare)
    alone = make_module(examine=False)
    alone.model.load_state_dict(found["weights"], strict=False)
    collate = lambda samples: make_batch(alone.model, tuple(samples))  # noqa: E731
    loader = DataLoader(list(QWEN), batch_size=4, collate_fn=collate)
    (means,) = make_trainer(tmp_path).validate(alone, loader, verbose=False)
    held_out = {name: x for name, x in found["means"].items() if name.startswith("val_")}
    assert held_out == pytest.approx(means, rel=1e-5)


def test_the_page_runs(tmp_path, monkeypatch):
    """docs/trainers/lightning.md, its blocks in one program."""
    text = (ROOT / "docs" / "trainers" / "lightning.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    answer = "the red patch"
    example = make_example(answer, [make_region(answer, "red patch")])
    names = {"model": tiny_qwen_model(), "processor": tiny_qwen_processor()}
    names["examples"] = [example] * 8
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["trainer"].global_step == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert {"map_kl", "val_map_kl"} <= names["trainer"].callback_metrics.keys()
