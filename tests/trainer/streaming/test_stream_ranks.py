"""Streams and mixtures on two processes: to the end, with as many batches each, and continued."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from groundkern.trainer import checkpoints, durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.streaming.position import FILE
from groundkern.trainer.train import train
from tests.hf.launching import FORKED, run
from tests.trainer.streaming.ranks_run import BATCH, make_files, settings
from tests.trainer.tiny_run import STEPS, losses, make_data

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("data"))
    make_files(data)
    return data


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The folder of what two processes made."""
    where = tmp_path_factory.mktemp("two")
    run("tests.trainer.streaming.ranks_run", str(data), str(where), launcher=FORKED)
    return where


@pytest.fixture(scope="module")
def seen(two):
    return [json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_every_process_trains_as_many_batches(seen):
    first, second = seen
    assert first == second
    # an epoch of the mixture: 2 x 6 + 0.7 x 3 samples
    mixture = 2 * -(-14 // (2 * BATCH))
    assert (first["lines"], first["parquet"], first["mixture"]) == (STEPS, 3, mixture)
    assert first["stopped"] == ["checkpoint-3", "checkpoint-5"]
    assert first["continued"] == STEPS - 5


def test_a_stream_stopped_twice_goes_on_bit_for_bit(two):
    assert losses(two / "cut") == losses(two / "lines")
    left, right = (
        load_file(two / name / folder.MODEL / "model.safetensors") for name in ("lines", "cut")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    last = [durable.read_json(two / name / "checkpoint-6" / FILE) for name in ("lines", "cut")]
    assert last[0] == last[1] and set(last[0]["places"]) == {"0", "1"}


def test_a_mixture_by_length_learns_what_one_process_learns(data, two, tmp_path):
    train(settings(data, tmp_path / "one", "mixture", batch_size=2 * BATCH))
    pairs = list(zip(losses(tmp_path / "one"), losses(two / "mixture"), strict=True))
    assert len(pairs) == 8
    for one, both in pairs:
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_one_process_goes_on_in_the_stream_of_two(data, two, tmp_path, caplog):
    output = tmp_path / "run"
    shutil.copytree(two / "lines", output)
    for path in checkpoints.listed(output)[1:]:
        shutil.rmtree(path)
    train(settings(data, output, "lines", accumulation=2, workers=0))
    assert "1 readers (processes x workers) go on where 2 were" in caplog.text
    assert len(losses(output)) == STEPS
    assert durable.read_json(output / "checkpoint-6" / FILE)["ranks"] == 1
