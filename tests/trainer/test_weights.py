"""Weights in a data file: read, checked, kept by the commands, shown and handed on."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.inspection.cards import card
from groundkern.trainer.inspection.recent import Recent
from groundkern.trainer.inspection.summary import oddities
from groundkern.trainer.places.writing import Writer
from groundkern.trainer.prepare.boxes.finding import Reading
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from tests.trainer.prepare.reading_samples import picture, prepared
from tests.trainer.prepare.reading_samples import write as write_records

PLACE = {"box": [0, 0, 4, 4]}
RECORD = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}],
    "regions": [{"text": "cat", **PLACE, "weight": 0.5}, {"text": "a cat", **PLACE}],
    "words": [{"text": "exit", **PLACE, "weight": 2}, {"text": "door", **PLACE, "weight": 0}],
    "phrases": [{"text": "a cat", "subject": "cat", "weight": 3}, {"text": "cat", "weight": 4}],
    "grounding_weight": 0.25,
}


@pytest.fixture
def data(tmp_path):
    """A file of three samples: with weights, gated, and plain."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    plain = {name: RECORD[name] for name in ("images", "messages")}
    records = [RECORD, {**RECORD, "grounding_weight": 0}, {**plain, "regions": RECORD["regions"]}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_weights_reach_the_example(data):
    dataset = JsonLinesDataset(data)
    example = dataset[0]
    assert [region.weight for region in example.regions] == [0.5, 1.0]
    assert [word.weight for word in example.words] == [2.0, 0.0]
    assert [phrase.weight for phrase in example.phrases] == [3.0, 4.0]
    assert [phrase.subject for phrase in example.phrases] == [(2, 5), None]
    assert [dataset[i].grounding_weight for i in range(3)] == [0.25, 0.0, 1.0]
    assert example.weight_of(example.phrases[0]) == 0.75
    assert dataset.counts["gated"].tolist() == [1, 6, 0]


@pytest.mark.parametrize("weight", [-1, "1", True, 1e10, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["regions", "words", "phrases", "grounding_weight"])
def test_a_bad_weight_is_one_clear_error(data, kind, weight):
    if kind == "grounding_weight":
        bad, where = {**RECORD, kind: weight}, "grounding_weight"
    else:
        bad, where = (
            {**RECORD, kind: [{**RECORD[kind][0], "weight": weight}]},
            rf"{kind}\[0\].weight",
        )
    with pytest.raises(SampleError, match=rf"^d:1: `{where}`: expected .+, got .+$"):
        parse_sample(bad, root=data.parent, where="d:1")


def test_inspect_shows_weights(data):
    dataset = JsonLinesDataset(data)
    cards = [card(dataset.sample(i), None, Recent()) for i in range(3)]
    assert cards[0].notes == [
        "grounding weight 0.25",
        "weight 0.5 of 1 of 2 regions",
        "weight 0 to 2 of 2 of 2 words",
        "weight 3 to 4 of 2 of 2 phrases",
    ]
    assert [shape.title for shape in cards[0].views[0].regions] == ["cat (weight 0.5)", "a cat"]
    assert cards[1].notes[0] == "grounding weight 0"
    assert cards[2].notes == ["weight 0.5 of 1 of 2 regions"]
    gated = oddities(dataset)["with regions, words or phrases of weight 0"]
    assert gated.tolist() == [True, True, False]


def test_commands_keep_weights(tmp_path):
    """Of chats of other programs a weight of 0 too, and of spans that move when boxes are read."""
    picture(tmp_path / "a.png", 200, 100)
    chat = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a cat"}]
    record = {**RECORD, "messages": chat, "grounding_weight": 0}
    file = write_records(tmp_path / "data.json", [record])
    status, (sample,), rejected = prepared(tmp_path / "out.jsonl", "adapt", "chat", file)
    assert (status, rejected) == (0, [])
    for kind in ("regions", "words", "phrases", "grounding_weight"):
        assert sample[kind] == record[kind], kind
    answer = (
        "the <|object_ref_start|>a cat<|object_ref_end|><|box_start|>(1,2),(500,800)<|box_end|>"
    )
    boxed = {**RECORD, "messages": [chat[0], {**chat[1], "content": answer}]}
    work = BoxSettings(Reading(), Writer("qwen3"), "both")
    found, counts = work(boxed, [(200, 100)], "a:1")
    assert counts["regions"] >= 1
    assert found["messages"][1]["content"] != answer
    assert [region.get("weight") for region in found["regions"]][:2] == [0.5, None]
    assert [phrase.get("weight") for phrase in found["phrases"]] == [3, 4]
    assert found["grounding_weight"] == 0.25
