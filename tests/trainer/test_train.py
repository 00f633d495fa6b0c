"""A run from files on disk to files on disk, with a tiny model: artifacts, stopping, continuing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, TrainerControl, TrainerState

from groundkern.hf import DvSft, GroundingCollator, Klal, Smam, attach, load_processor
from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.collating import COUNTS, RobustCollator
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.last_step import LastStep
from groundkern.trainer.program import main
from groundkern.trainer.ranks import Ranks
from groundkern.trainer.stopping import Stopped, StopSignals
from groundkern.trainer.train import train
from tests.trainer.tiny_run import STEPS, config, losses, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted grounded run."""
    output = tmp_path_factory.mktemp("finished")
    train(config(data, output))
    return output


def test_artifacts(data, finished):
    rows = folder.read_metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    terms = folder.loss_terms(rows)
    assert terms[0] == "loss"
    assert {"text", "word", "map_kl", "smam_grounding", "smam_cross_entropy"} < set(terms)
    assert rows[-1]["map_kl"] < rows[0]["map_kl"]
    record = durable.read_json(finished / folder.RECORD)
    assert record["steps"] == STEPS
    assert record["samples"] == {"train": 9, "test": 4}
    assert record["bad_samples"]["train"] == {"count": 0, "first": []}
    # 2.25 passes over 9 samples in batches of 2: 5 batches a pass, 2 of them a step, 1 the last
    assert record["supervision"]["samples"] == 2 * 9
    assert record["final_losses"]["loss"] == rows[-1]["loss"]
    assert Config.model_validate(record["config"]) == config(data, finished)
    assert not list(finished.rglob("pytorch_model*"))
    report = (finished / folder.REPORT).read_text(encoding="utf-8")
    assert report.count("<img") == 1 + 2 * 2


def test_the_saved_model_is_the_trained_one(data, finished):
    load = AutoModelForImageTextToText.from_pretrained
    trained, start = load(finished / folder.MODEL), load(data / "model")
    name = "lm_head.weight"
    assert not torch.equal(trained.state_dict()[name], start.state_dict()[name])
    assert load_processor(finished / folder.MODEL).tokenizer.is_fast


def test_evaluation_before_is_that_of_the_start(finished):
    before, after = (durable.read_json(finished / n) for n in (folder.BEFORE, folder.AFTER))
    figures = before["tasks"]["pointing"], after["tasks"]["pointing"]
    assert figures[0]["samples"] == figures[1]["samples"] == 4
    assert figures[0]["answer_loss"] > figures[1]["answer_loss"]
    # "red" under the left square, "the" under the middle one, unless their token is the same
    assert figures[0]["word_baseline"] == figures[1]["word_baseline"] == 0.5
    assert len(before["heat_maps"]) == 1
    assert len(before["heat_maps"][0]["attention"]) == 9


def test_stopping_saves_and_continuing_gives_the_same_losses(data, finished, tmp_path):
    output = tmp_path / "run"
    settings = tmp_path / "config.json"  # JSON is YAML
    wanted = config(data, output)
    settings.write_text(wanted.model_dump_json())
    process = run(["train", "--config", str(settings)])
    deadline = time.monotonic() + 300
    while len(folder.read_metrics(output)) < 1 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143
    (saved,) = checkpoints.listed(output)
    stopped_at = int(saved.name.rpartition("-")[2])
    assert 1 <= stopped_at < STEPS
    assert f"Stopped by SIGTERM: saved in {saved}" in err
    assert not (output / folder.REPORT).exists()

    train(wanted)
    assert losses(output) == losses(finished)
    for name in (folder.RECORD, folder.AFTER):
        ours, theirs = (durable.read_json(o / name) for o in (output, finished))
        for key in ("supervision", "tasks"):
            assert ours.get(key) == theirs.get(key)
    assert durable.read_json(output / folder.RECORD)["continued_from"] == str(saved)


def test_signals_outside_training_and_second_ones_stop_at_once(monkeypatch, capfd):
    old = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", sys.exit)
    control = TrainerControl()
    with StopSignals().installed():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.code == 128 + signal.SIGINT
    with StopSignals().installed() as stop:
        last = LastStep(stop, Ranks(), news=lambda: False, exchange=lambda: None)
        state = TrainerState(global_step=1, max_steps=9)
        last.on_train_begin(None, state, control)
        last.on_step_end(None, state, control)
        assert not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        last.on_step_end(None, state, control)
        assert control.should_training_stop
        assert control.should_save
        assert "after this step, which is saved" in capfd.readouterr().err
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
        assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is old


def test_a_finished_run_is_not_trained_further(data, finished):
    rows = losses(finished)
    train(config(data, finished))
    assert losses(finished) == rows


def test_other_settings_or_never_do_not_touch_a_finished_run(data, finished):
    for section, field, value, sentence in (
        ("objectives", "smam", None, "objectives.smam.weight: 1.0 -> null"),
        ("training", "resume", "never", "holds checkpoints of an earlier run"),
        ("training", "resume", "nowhere", "expected auto, never or a checkpoint, got nowhere"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            train(config(data, finished, **{section: {field: value}}))


def test_continuing_from_a_named_checkpoint_may_change_settings(data, finished, tmp_path):
    (checkpoint,) = checkpoints.listed(finished)
    changed = {"resume": str(checkpoint), "steps": STEPS + 1, "learning_rate": 1e-4}
    wanted = config(
        data, tmp_path, training=changed, data={"test": None}, objectives={"klal": None}
    )
    train(wanted)
    (row,) = folder.read_metrics(tmp_path)
    assert row["step"] == STEPS + 1
    assert "map_kl" not in row
    report = (tmp_path / folder.REPORT).read_text(encoding="utf-8")
    assert "continued from checkpoint-6" in report


def test_lora_saves_an_adapter_leaves_vision_alone_and_continues(data, tmp_path):
    model = {"lora": {"r": 2, "dropout": 0.1}, "freeze_vision": True}
    training = {"steps": 2, "save_every": 1}
    changed = {"model": model, "data": {"test": None}}
    train(config(data, tmp_path, training=training, **changed))
    adapter = safe_open(tmp_path / folder.MODEL / "adapter_model.safetensors", "pt")
    assert any("q_proj" in name for name in adapter.keys())  # noqa: SIM118
    assert not any("visual" in name for name in adapter.keys())  # noqa: SIM118
    record = durable.read_json(tmp_path / folder.RECORD)
    assert record["trained_parameters"] < record["parameters"] / 2

    again = tmp_path / "again"
    training = {**training, "resume": str(checkpoints.listed(tmp_path)[0])}
    train(config(data, again, training=training, **changed))
    assert losses(again) == losses(tmp_path)[1:]


def test_autocast_checkpointing_and_worker_processes(data, tmp_path):
    training = {"steps": 1, "bf16": True, "workers": 1}
    model = {"gradient_checkpointing": True, "freeze_vision": True}
    train(config(data, tmp_path, model=model, training=training, data={"test": None}))
    record = durable.read_json(tmp_path / folder.RECORD)
    assert record["supervision"]["samples"] == 4
    assert record["trained_parameters"] < record["parameters"]


def test_bad_samples_are_counted_or_stop_the_run(data, tmp_path, capsys):
    lines = (data / "train.jsonl").read_text().splitlines()
    outside = json.loads(lines[0])
    outside["regions"][0]["box"] = [0, 0, 85, 84]
    Image.new("RGB", (224, 224)).save(data / "large.png")
    large = {**json.loads(lines[1]), "images": ["large.png"], "regions": [], "words": []}
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines, json.dumps(outside), json.dumps(large)]))
    changed = {"train": str(bad), "root": str(data), "test": str(bad), "max_length": 60}
    settings = {"steps": None, "epochs": 1}
    wanted = config(data, tmp_path / "run", data=changed, training=settings)
    train(wanted)
    record = durable.read_json(tmp_path / "run" / folder.RECORD)
    assert record["steps"] == 3  # 10 samples in batches of 2, two batches a step
    for counted in record["bad_samples"].values():
        assert counted["count"] == 2
        assert {one["where"] for one in counted["first"]} == {"bad.jsonl:10", "bad.jsonl:11"}

    stop = tmp_path / "stop.json"
    stop.write_text(wanted.model_dump_json())
    words = ["--config", str(stop), "--training.output", str(tmp_path / "other")]
    capsys.readouterr()
    assert main(["train", *words, "--on-bad-sample", "stop"]) == 1
    assert "error: bad.jsonl:10: `regions[0].box`" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": {"path": "no/such/model"}}, "`model.path`: expected a model folder"),
        ({"model": {"path": "data/modle"}}, "data is a folder here, so it is no name on the hub"),
        ({"data": {"train": "none.jsonl"}}, "got none.jsonl (not there)"),
        ({"evaluation": {"compare": "nothing"}}, "`evaluation.compare`: expected the output of"),
    ],
)
def test_what_is_not_there_ends_with_2(data, tmp_path, capsys, monkeypatch, changed, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    settings = tmp_path / "config.json"
    settings.write_text(config(data, tmp_path / "run", **changed).model_dump_json())
    assert main(["train", "--config", str(settings)]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_of_bad_samples_only_teaches_nothing(data):
    processor = load_processor(data / "model")
    model = AutoModelForImageTextToText.from_pretrained(data / "model")
    lines = JsonLinesDataset(data / "train.jsonl")
    large = dataclasses.replace(lines[0], images=(Image.new("RGB", (224, 224)),), name="large")
    collator = RobustCollator(GroundingCollator(processor, model.config, max_length=60), "skip")
    with pytest.raises(SampleError, match="large"):
        collator([large])
    good = collator([lines[0], lines[1]])
    counted = dict(collator.collator.counts)
    batch = collator([large, large])
    assert [bad.where for bad in batch[COUNTS]["bad"]] == ["large", "large"]
    assert batch[COUNTS]["supervision"] == {}
    assert collator.collator.counts == counted
    assert len(collator.bad) == 1
    mixed = collator([large, lines[1]])
    assert mixed["input_ids"].shape[0] == 1
    assert mixed[COUNTS]["supervision"]["samples"] == 1

    attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal()).train()
    for given, learns in ((good, True), (batch, False)):
        model.zero_grad()
        model(**{k: v for k, v in given.items() if k != COUNTS}).loss.backward()
        moved = any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        assert moved == learns
