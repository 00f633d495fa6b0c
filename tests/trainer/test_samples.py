"""`load_samples`: the data set of a trainer of one's own, from our format and from others'."""

from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from groundkern.hf import GroundedExample
from groundkern.trainer import load_samples
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    return tmp_path


def _chat(folder, *answers):
    """A file as LLaMA-Factory has it."""
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>Where?"},
                {"role": "assistant", "content": answer},
            ],
            "images": ["a.png"],
        }
        for answer in answers
    ]
    path = folder / "chat.json"
    path.write_text(json.dumps(records))
    return path


def test_samples_of_the_format_are_read_where_they_are(folder):
    sample = {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "The cat."},
        ],
        "regions": [{"text": "cat", "box": [20, 10, 100, 50]}],
    }
    path = folder / "samples.jsonl"
    path.write_text(json.dumps(sample) + "\n")
    before = sorted(folder.iterdir())
    data = load_samples(path)
    assert sorted(folder.iterdir()) == before, "nothing is written"
    assert len(data) == 1 and isinstance(data[0], GroundedExample)
    (region,) = data[0].regions
    assert region.boxes == ((0.1, 0.1, 0.5, 0.5),) and (region.start, region.stop) == (4, 7)


def test_a_chat_file_is_made_into_samples(folder):
    path = _chat(folder, "At <box>[[100, 200, 500, 600]]</box>", "Nowhere.")
    made = folder / "made"
    data = load_samples(path, boxes="internvl", folder=made)
    assert len(data) == 2 and (made / "chat.jsonl").exists()
    assert data[0].regions[0].boxes == ((0.1, 0.2, 0.5, 0.6),)
    assert load_samples(path, boxes="none")[0].regions == ()


def test_what_cannot_be_used_is_left_out_with_a_warning(folder, caplog):
    path = _chat(folder, "Here.")
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records, {**records[0], "images": ["gone.png"]}]))
    with caplog.at_level(logging.WARNING):
        data = load_samples(path)
    assert len(data) == 1 and len(data.bad) == 1
    assert "skipped 1 of 2 samples" in caplog.text


def test_refusals(folder):
    with pytest.raises(FileNotFoundError, match=r"`file`: expected a file of samples, got .*gone"):
        load_samples(folder / "gone.json")
    with pytest.raises(ConfigError, match="`boxes`: expected one of auto, none"):
        load_samples(_chat(folder, "Here."), boxes="nothing such")
    (folder / "empty.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(SampleError, match="no usable sample among 1"):
        load_samples(folder / "empty.jsonl")
