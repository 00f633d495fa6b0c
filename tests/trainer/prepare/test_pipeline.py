"""The shared core: order, rejected inputs, continuing, workers, what a second run refuses."""

import json
import os
import signal

import pytest
from PIL import Image

from trainer.images import SampleError
from trainer.prepare.pipeline import LeftOut, Made, prepare
from trainer.prepare.sources import values
from trainer.stopping import Stopped

SETTINGS = {"command": "test", "level": 3}


def sample(answer: str, **more) -> dict:
    return {"messages": [{"role": "assistant", "content": answer}], **more}


def work(item) -> Made:
    """One sample an input; what the input says may go wrong does."""
    if item.value == "bad":
        raise SampleError(f"{item.where}: expected a good one")
    if item.value == "left out":
        raise LeftOut(f"{item.where}: too dull")
    if item.value == "invalid":
        return Made([sample("")])
    if item.value == "bug":
        raise KeyError("x")
    if item.value == "stop":
        raise Stopped(signal.SIGTERM)
    if item.value == "die":
        os._exit(1)
    name = f"pages/{item.index}.png"
    return Made([sample(item.value, images=[name])], {name: Image.new("L", (4, 4))}, {"made": 1})


def source(*texts):
    return values(
        lambda: ((f"n{i}", text) for i, text in enumerate(texts)),
        total=len(texts),
        identity={"texts": len(texts)},
    )


def answers(path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.mark.parametrize("workers", [1, 2])
def test_order_images_rejects_and_counts(tmp_path, workers):
    path = tmp_path / "new" / "out.jsonl"
    texts = [*map(str, range(20)), "bad", "left out", "20"]
    out = prepare(source(*texts), work, output=path, settings=SETTINGS, workers=workers)
    assert answers(path) == list(map(str, range(21)))
    assert (out.inputs, out.samples, out.rejected, out.counts["made"]) == (23, 21, 2, 21)
    assert len(list((path.parent / "pages").glob("*.png"))) == 21
    rejected = [json.loads(line) for line in out.rejects.read_text().splitlines()]
    assert rejected == [
        {"where": "n20", "reason": "expected a good one", "original": "bad"},
        {"where": "n21", "reason": "too dull", "original": "left out"},
    ]
    assert not list(path.parent.rglob("*.partial"))
