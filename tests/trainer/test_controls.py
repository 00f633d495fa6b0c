"""Runs on wrong regions: what is trained and measured, and that it is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from groundkern.hf import GroundingCollator, GroundingTrainer, Klal, Smam, attach, load_processor
from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.controls import PoolOfDataset, controlled, regions_of
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.loading import load_model
from groundkern.trainer.train import train
from tests.hf.closeness import assert_differ_in_attention, gradients
from tests.trainer.tiny_run import config, losses

pytestmark = pytest.mark.usefixtures("one_thread")
CONTROLS = {"smam": {"control": "random"}, "klal": {"control": "shuffled"}, "dv_sft": {}}


def test_a_control_trains_on_wrong_regions_and_is_measured_on_right_ones(data, tmp_path, capsys):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    steps = {"steps": 1}
    for output, objectives in ((right, {}), (wrong, CONTROLS)):
        train(config(data, output, objectives=objectives, training=steps | {"output": str(output)}))
    (plain,), (control,) = losses(right), losses(wrong)
    for term in ("text", "word"):
        assert plain[term] == control[term]
    for term in ("map_kl", "smam_grounding", "grad_norm"):
        assert plain[term] != control[term]
    before = [durable.read_json(output / folder.BEFORE) for output in (right, wrong)]
    assert before[0] == before[1]
    words = "SMAM on its regions at a random place and KLAL on another sample&#39;s regions"
    report = (wrong / folder.REPORT).read_text(encoding="utf-8")
    assert f"(control: {words})" in report
    assert "control:" not in (right / folder.REPORT).read_text(encoding="utf-8")
    said = capsys.readouterr()
    assert (said.out + said.err).count("This run is a control: SMAM on its regions") == 1


def test_every_process_and_epoch_draws_the_same(data, tmp_path):
    settings = config(data, tmp_path, objectives=CONTROLS)
    datasets = [JsonLinesDataset(data / "train.jsonl") for _ in range(2)]
    model, processor = load_model(settings)
    found = []
    for samples in datasets:
        collator = GroundingCollator(processor, model.config, **controlled(settings, samples))
        found.append([collator([samples[i]]) for i in (3, 4, 3)])
    for batches in zip(*found, strict=True):
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    again, _, third = found[0]
    assert torch.equal(again["gk_map_target"], third["gk_map_target"])
    pool = PoolOfDataset(datasets[0])
    assert [pool[i].key for i in range(len(pool))] == [
        regions_of(datasets[0].sample(i)).key for i in range(9)
    ]


@pytest.mark.parametrize(
    "kind",
    ["shuffled", *(pytest.param(x, marks=pytest.mark.long) for x in ("random", "complement"))],
)
def test_losses_and_gradients_change(data, tmp_path, kind):
    settings = config(data, tmp_path, objectives={n: {"control": kind} for n in ("smam", "klal")})
    samples = JsonLinesDataset(data / "train.jsonl")
    model, processor = load_model(settings)
    attach(model, smam=Smam(), klal=Klal()).train()
    found, parts = [], []
    for options in ({}, controlled(settings, samples)):
        collator = GroundingCollator(processor, model.config, **options)
        output = model(**collator([samples[i] for i in range(4)]))
        parts.append(output.parts)
        found.append(gradients(model, output.loss))
    assert torch.equal(parts[0]["text"], parts[1]["text"])
    for name in ("map_kl", "smam_grounding", "smam_cross_entropy"):
        assert abs(float(parts[0][name] - parts[1][name])) > 1e-4
    assert_differ_in_attention(*found)


def test_refusals(data, tmp_path):
    with pytest.raises(ConfigError, match=r"objectives.klal.control.*margins"):
        config(data, tmp_path, objectives={"klal": {"control": "random"}, "margins": {}})
    with pytest.raises(ConfigError, match=r"objectives.smam.control.*expected.*'shuffled'"):
        config(data, tmp_path, objectives={"smam": {"control": "wrong"}})
    settings = config(data, tmp_path)
    model, _ = load_model(settings)
    collator = GroundingCollator(load_processor(data / "model"), model.config)
    for objectives, name in (
        ({"klal": Klal(control="random")}, "map_control"),
        ({"smam": Smam(control="random")}, "side_control"),
        ({"smam": Smam(keep="registers")}, "keep_registers"),
    ):
        attach(model, **objectives)
        with pytest.raises(ValueError, match=f"data_collator.{name}"):
            GroundingTrainer(model=model, data_collator=collator)
    assert dataclasses.replace(Smam(), control="random").control == "random"
