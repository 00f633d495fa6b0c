"""Runs whose training batches are packed: the same steps, less padding, and figures that say so."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from groundkern.hf import GroundingCollator, load_processor
from groundkern.trainer import run_folder as folder
from groundkern.trainer.collating import COUNTS, RobustCollator
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.order import Filled, Filler
from groundkern.trainer.program import main
from groundkern.trainer.train import train
from tests.trainer.tiny_run import config, sample

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = ("tokens_per_second", "padding", "padding_unpacked")


@pytest.fixture(scope="module")
def uneven(data):
    """Training samples of several lengths, beside those of `data`."""
    lines = [sample(data, i) for i in range(9)]
    for i, line in enumerate(lines):
        line["messages"][0]["content"][1]["text"] = "Where is the red patch? " * (1 + 3 * (i % 3))
    path = data / "uneven.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_packed_run_trains_as_a_padded_one(data, uneven, tmp_path, capsys):
    rows, lines = {}, {}
    for name, pack_to in (("padded", None), ("packed", 200)):
        settings = config(
            data,
            tmp_path / name,
            data={"train": str(uneven), "pack_to": pack_to},
            training={"steps": 2, "batch_size": 4, "accumulation": 1},
            evaluation={"heatmaps": 0},
        )
        train(settings)
        rows[name] = folder.read_metrics(tmp_path / name)
        lines[name] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
        assert (tmp_path / name / folder.REPORT).exists()
    terms = folder.loss_terms(rows["padded"])
    assert folder.loss_terms(rows["packed"]) == terms
    assert not {*terms} & {*FIGURES}
    for padded, packed in zip(rows["padded"], rows["packed"], strict=True):
        for term in (*terms, "grad_norm"):
            assert packed[term] == pytest.approx(padded[term], rel=1e-5, abs=1e-6), term
        assert packed["tokens_per_second"] > 0
        assert packed["padding"] < packed["padding_unpacked"]
        assert padded["padding"] == padded["padding_unpacked"] == packed["padding_unpacked"] > 0
    shares = [f"{rows['packed'][0][name]:.0%}".replace("%", " %") for name in FIGURES[:0:-1]]
    assert lines["packed"][0].endswith(f"tokens/s  padding {shares[0]} -> {shares[1]}")
    assert lines["padded"][0].endswith(f"tokens/s  padding {shares[0]}")


def test_samples_that_no_row_holds_are_left_out(data):
    processor = load_processor(data / "model")
    model = AutoModelForImageTextToText.from_pretrained(data / "model")
    lines = JsonLinesDataset(data / "train.jsonl")
    collator = RobustCollator(GroundingCollator(processor, model.config, pack_to=80), "skip", lines)
    good = [lines[i] for i in range(3)]
    batch = collator([good[0], _large(lines[3]), *good[1:]])
    (bad,) = batch[COUNTS]["bad"]
    assert bad.where == "large"
    assert "`pack_to`: expected at least its" in f"`{bad.reason}"
    assert batch[COUNTS]["supervision"]["samples"] == 3
    blank = collator([_large(lines[3])])  # another batch, with nothing to learn
    assert blank[COUNTS]["supervision"] == {}
    assert (blank["labels"] == -100).all()
    assert "position_ids" in blank
    with pytest.raises(SampleError, match="`large: pack_to`"):
        RobustCollator(collator.collator, "stop")([_large(lines[3])])


@pytest.mark.parametrize("pack_to", [None, 10**9])
def test_samples_that_fill_a_batch_up_count_nowhere(data, uneven, pack_to):
    """Neither their tokens nor what was laid for them."""
    processor = load_processor(data / "model")
    model = AutoModelForImageTextToText.from_pretrained(data / "model")
    lines = Filled(JsonLinesDataset(uneven))
    collator = GroundingCollator(processor, model.config, pack_to=pack_to)
    robust = RobustCollator(collator, "skip", lines.data)
    lengths = [robust([lines[i]])[COUNTS]["supervision"]["tokens"] for i in range(3)]
    assert len({*lengths}) == 3  # the last is the longest
    found = robust([lines[2], lines[Filler(0)], lines[Filler(1)]])[COUNTS]["supervision"]
    assert (found["samples"], found["tokens"]) == (1, lengths[2])
    assert found["tokens_laid"] == found["tokens_padded"] == lengths[2]
    assert robust([lines[Filler(0)], lines[Filler(2)]])[COUNTS]["supervision"] == {}
    found = robust([lines[0], lines[Filler(2)]])[COUNTS]["supervision"]
    assert found["tokens_padded"] == lengths[2]  # the filler's row is as wide
    assert found["tokens_laid"] == (lengths[2] if pack_to is None else lengths[0])


def _large(example):
    return dataclasses.replace(example, images=(Image.new("RGB", (280, 280)),), name="large")


def test_a_sentence_about_the_processor_ends_the_run(data, monkeypatch):
    """It is no sample's fault, so none is skipped for it."""
    collator = GroundingCollator(
        load_processor(data / "model"),
        AutoModelForImageTextToText.from_pretrained(data / "model").config,
        pack_to=500,
    )
    monkeypatch.setattr(
        "groundkern.hf.data.merging._DIMS", {("Qwen2_5_VLProcessor", "image_grid_thw"): 1}
    )
    lines = JsonLinesDataset(data / "train.jsonl")
    robust = RobustCollator(collator, "skip", lines)
    with pytest.raises(SampleError, match=r"^`processor`: expected .* \(no packing\)$"):
        robust([lines[0], lines[1]])
    assert not robust.bad


def test_rows_shorter_than_samples_are_refused(data, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"`data.max_length`: .* `data.pack_to`, which is 64"):
        config(
            data,
            tmp_path / "run",
            data={"max_length": 65, "pack_to": 64},
        )
    words = ["--data.train", str(data / "train.jsonl"), "--model.path", str(data / "model")]
    more = ["--training.output", str(tmp_path), "--data.max_length", "9", "--data.pack_to", "8"]
    assert main(["train", *words, *more]) == 2
    assert "expected at most `data.pack_to`, which is 8, got 9" in capsys.readouterr().err
