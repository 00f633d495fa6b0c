"""What `--model` and `--adapter` may name."""

from __future__ import annotations

import json

import pytest

from groundkern.trainer.config import ConfigError
from groundkern.trainer.evaluation.models import named
from groundkern.trainer.run_folder import RECORD
from groundkern.trainer.train import train
from tests.trainer.evaluation.small import make, predictions, result, run
from tests.trainer.tiny_run import config, make_data


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(where):
    """An adapter of the model that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_pretrained(where / "model")
    linears = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    lora = LoraConfig(r=4, target_modules=linears, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(where / "adapter")
    return where / "adapter"


def test_an_adapter_answers_and_is_told_from_its_base(where, adapter, tmp_path):
    few = ("--samples", "2")
    assert run(where, tmp_path / "base", *few) == 0
    assert run(where, tmp_path / "both", *few, "--adapter", str(adapter), full=True) == 0
    assert run(where, tmp_path / "alone", *few, "--model", str(adapter)) == 0  # names its base
    base, both, alone = (
        [row["prediction"] for row in predictions(tmp_path / name)]
        for name in ("base", "both", "alone")
    )
    assert base != both
    assert both == alone
    found, plain = result(tmp_path / "both"), result(tmp_path / "base")
    identity = found["settings"]["model"]
    assert identity["weights"] == plain["settings"]["model"]["weights"]
    assert len(identity["adapter"]) == 64
    assert found["grounding_refused"] is None
    assert "attention_ratio" in found["tasks"]["pointing"]["figures"]
    assert run(where, tmp_path / "base", "--adapter", str(adapter)) == 2


def test_an_adapter_of_another_model_is_refused(where, adapter, tmp_path, capsys):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (other / "adapter_model.safetensors").write_bytes(weights)
    for wrong in ({"r": 8}, {"target_modules": ".*o_proj"}, {"target_modules": "none"}):
        (other / "adapter_config.json").write_text(json.dumps({**settings, **wrong}))
        assert run(where, tmp_path / "out", "--adapter", str(other)) == 2
        error = capsys.readouterr().err.strip()
        assert "does not fit the model" in error
        assert "\n" not in error


def test_two_adapters_are_refused(adapter):
    with pytest.raises(ConfigError, match="which is an adapter itself"):
        named(str(adapter), str(adapter))


def test_an_adapter_without_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say of which"):
        named(str(tmp_path), None)


def test_runs_and_checkpoints_are_found(tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ConfigError, match="which has only checkpoints so far"):
        named(str(run), None)
    record = {"config": {"model": {"path": "base"}}}
    (checkpoint / RECORD).write_text(json.dumps(record))
    (checkpoint / "config.json").write_text("{}")
    found = named(str(checkpoint), None)
    assert (found.weights, found.processor) == (str(checkpoint), "base")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (run / RECORD).write_text("{}")
    assert named(str(run), None).weights == str(run / "model")
    (run / "model" / "config.json").unlink()
    (run / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    found = named(str(run), None)
    assert (found.weights, found.adapter) == ("base", run / "model")


@pytest.mark.long
@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4, "dropout": 0.0}])
def test_a_run_and_its_checkpoint_answer_alike(tmp_path, lora):
    """The output of a run, its model and its last checkpoint are the same weights."""
    data = make_data(tmp_path)
    model = {"lora": lora} if lora else {}
    training = {"save_every": 3, "steps": 3}
    train(config(data, tmp_path / "run", model=model, training=training))
    said = []
    for at, name in enumerate(("run", "run/model", "run/checkpoint-3")):
        more = ("--model", str(tmp_path / name), "--samples", "2")
        assert run(tmp_path, tmp_path / f"out{at}", *more) == 0
        said.append([row["prediction"] for row in predictions(tmp_path / f"out{at}")])
    assert said[0] == said[1] == said[2]
