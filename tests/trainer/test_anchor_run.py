"""A run with an anchor: its token is added, trained, saved, loaded and continued from."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from groundkern.hf import load_processor
from groundkern.trainer import checkpoints
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.evaluation.models import named
from groundkern.trainer.train import train
from tests.trainer.tiny_run import config, losses, make_data

ANCHOR = "<ANCHOR>"
AIMA = {
    "supervision": {"map_rows": "anchor", "anchor_token": ANCHOR, "map_kind": "centre"},
    "objectives": {
        "smam": None,
        "dv_sft": None,
        "klal": {"head_weight": "sink", "average_layers": True, "over": "renormalised"},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The red squares, whose answers end with the anchor."""
    where = make_data(tmp_path_factory.mktemp("anchor"))
    for name in ("train", "test"):
        path = where / f"{name}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        for sample in samples:
            sample["messages"][-1]["content"] += ANCHOR
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return where


def embedding(where, folder_of, token: int) -> torch.Tensor:
    """[2, D]: the token's rows in the embeddings of a model that `evaluate` would load."""
    model, processor = named(str(folder_of), None).load(dtype="float32", attn_implementation="sdpa")
    assert processor.tokenizer.convert_tokens_to_ids(ANCHOR) == token
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([token])
    head = base.get_output_embeddings()
    width = base.get_input_embeddings()(ids).shape[1]
    column = head(torch.eye(width))[:, token]
    return torch.stack((base.get_input_embeddings()(ids)[0], column)).detach()


WHOLE = pytest.param(None, marks=pytest.mark.long)


@pytest.mark.parametrize("lora", [WHOLE, {"r": 2, "alpha": 4}], ids=["whole", "lora"])
def test_the_anchor_trains_and_a_run_with_it_continues(data, tmp_path, lora):
    model = {"lora": lora, "gradient_checkpointing": lora is None}
    training = {"steps": 2, "save_every": 1, "keep": 3, "accumulation": 1}
    changed = {**AIMA, "model": model, "data": {"test": None}}
    train(config(data, tmp_path / "run", training=training, **changed))
    rows = folder.read_metrics(tmp_path / "run")
    assert all(row["map_kl"] > 0 for row in rows)

    start = AutoModelForImageTextToText.from_pretrained(data / "model")
    token = len(load_processor(data / "model").tokenizer)
    old = [start.get_input_embeddings().weight, start.get_output_embeddings().weight]
    mean = torch.stack([x.detach().mean(0) for x in old])
    found = {
        name: embedding(data, tmp_path / "run" / name, token)
        for name in ("model", "checkpoint-1", "checkpoint-2")
    }
    assert torch.equal(found["model"], found["checkpoint-2"])
    for which in (0, 1):  # of the input and of the output
        torch.testing.assert_close(found["checkpoint-1"][which], mean[which])  # a warm-up step of 0
        assert not torch.allclose(found["checkpoint-2"][which], mean[which], atol=1e-5)

    training |= {"resume": str(checkpoints.listed(tmp_path / "run")[0])}
    train(config(data, tmp_path / "again", training=training, **changed))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[1:]
    assert torch.equal(embedding(data, tmp_path / "again" / "model", token), found["model"])


def test_what_an_anchor_needs_is_said_by_name(data, tmp_path):
    with pytest.raises(ConfigError, match=r"supervision.anchor_token.*beside map_rows anchor"):
        config(data, tmp_path, supervision={"map_rows": "anchor"})
    with pytest.raises(ConfigError, match=r"over.*renormalised with head_weight sink"):
        config(data, tmp_path, objectives={"klal": {"head_weight": "sink"}})
    klal = {"head_weight": "pattern", "over": "renormalised"}
    with pytest.raises(ConfigError, match="average_layers"):
        config(data, tmp_path, objectives={"klal": klal})
    with pytest.raises(ConfigError, match="sink_queries"):
        config(data, tmp_path, objectives={"klal": {"sink_queries": 0}})
