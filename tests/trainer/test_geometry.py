"""Which geometry a run uses, and that a measured one trains as the table does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_llava_model, tiny_llava_processor
from groundkern.hf import MeasuredGeometry
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.geometry import FOLDER, geometry_of, measure_ahead
from groundkern.trainer.train import train
from tests.trainer.tiny_run import config, losses

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_without_a_table_is_measured(capsys):
    model, processor = tiny_llava_model(), tiny_llava_processor()
    assert isinstance(geometry_of(model, processor), partial)
    assert capsys.readouterr().out == ""
    assert isinstance(geometry_of(model, processor, "measured"), MeasuredGeometry)
    model.config.model_type = "a_new_family"
    capsys.readouterr()
    assert isinstance(geometry_of(model, processor), MeasuredGeometry)
    out = capsys.readouterr().out
    assert out == (
        "The places of visual tokens are measured on the model: 'a_new_family' has no table.\n"
    )
    with pytest.raises(ConfigError, match=r"`data\.geometry`: .*a_new_family"):
        geometry_of(model, processor, "table")
    model.config.image_token_id = processor.image_token_id = None
    with pytest.raises(ConfigError, match="image_token_id"):
        geometry_of(model, processor)


def test_every_size_is_measured_once_and_ahead(data, tmp_path, monkeypatch):
    text = (data / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(text)
    for i in range(9):
        Image.new("RGB", (84, 84) if i % 3 else (90, 60)).save(tmp_path / f"{i}.png")
    dataset = JsonLinesDataset(tmp_path / "train.jsonl")
    asked = []
    geometry = geometry_of(tiny_llava_model(), tiny_llava_processor(), "measured")
    monkeypatch.setattr(geometry, "measure", lambda samples: asked.extend(samples))
    (tmp_path / "4.png").unlink()  # reported when its turn comes
    measure_ahead(geometry, [dataset, dataset])
    assert sorted(asked) == [((84, 84),), ((90, 60),)]

    def refuse(samples):
        raise ValueError("`model`: expected visual tokens with a place, got a resampler")

    monkeypatch.setattr(geometry, "measure", refuse)
    with pytest.raises(ConfigError, match="a resampler"):
        measure_ahead(geometry, [dataset])
    measure_ahead(partial(torch.zeros, 1), [dataset])  # a table needs no measuring


def test_a_measured_run_is_that_of_the_table(data, tmp_path):
    for kind, workers in (("table", 0), ("measured", 1)):
        training = {"steps": 2, "workers": workers}
        train(config(data, tmp_path / kind, data={"geometry": kind}, training=training))
    assert losses(tmp_path / "table") == losses(tmp_path / "measured")
    assert len(list((tmp_path / "measured" / FOLDER).iterdir())) == 1
    assert not (tmp_path / "table" / FOLDER).exists()
