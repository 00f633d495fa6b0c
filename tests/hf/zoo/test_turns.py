"""Chats of every kind in every family: what is trained is the answer, and rows are its words.

Only configs of models are made, not their weights.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import PreTrainedModel

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundedExample, GroundingCollator, Region
from groundkern.hf.data import calling
from groundkern.hf.data.geometry import NO_PLACE, check_family

IMAGES = (Image.new("RGB", (120, 70), "white"), Image.new("RGB", (64, 150), "white"))
IMAGE = {"type": "image"}
WORDS, ANSWER = "red one", "The red one."
# whose chats' templates write no placeholders, or which have no template
OTHERS = ("pp_chart2table", "fuyu")
NAMES = [
    name
    for name, family in families().items()
    if family.processor and name not in NO_PLACE and name not in OTHERS
]


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def turn(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


# chats of both images, and the visible text that is trained
CHATS = {
    "text between": (
        [
            turn("user", said("Compare "), IMAGE, said(" with "), IMAGE, said(" please.")),
            turn("assistant", said(ANSWER)),
        ],
        ANSWER,
    ),
    "system": (
        [
            turn("system", IMAGE, said("You see a chart.")),
            turn("user", said("And "), IMAGE),
            turn("assistant", said(ANSWER)),
        ],
        ANSWER,
    ),
    "assistant": (
        [
            turn("user", said("Show "), IMAGE),
            turn("assistant", said("Here: "), IMAGE, said(f" {ANSWER}")),
        ],
        f"Here: {ANSWER}",
    ),
    "two turns": (
        [
            turn("user", IMAGE, said("The first?")),
            turn("assistant", said("A red patch.")),
            turn("user", IMAGE, said("The second?")),
            turn("assistant", said(ANSWER)),
        ],
        f"A red patch. {ANSWER}",
    ),
}


def example(messages: list[dict]) -> GroundedExample:
    """With the second image's upper left as the region of the last answer's words."""
    text = "".join(part.get("text", "") for part in messages[-1]["content"])
    start = text.index(WORDS)
    region = Region(len(messages) - 1, start, start + len(WORDS), 1, boxes=((0, 0, 0.5, 0.5),))
    return GroundedExample(IMAGES, messages, (region,))


def config_of(name: str, monkeypatch):
    """The config of a family's model, without weights."""

    def bare(config, **_):
        model = SimpleNamespace(config=config, parameters=list)
        model.eval = lambda: model
        return model

    monkeypatch.setattr(PreTrainedModel, "_from_config", bare)
    return families()[name].model().config


def collating_parts(name, monkeypatch):
    """The processor and the config of a family; skips where they cannot be used here."""
    try:
        check_family(name.partition(":")[0])
        parts = families()[name].processor(), config_of(name, monkeypatch)
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))
    if name == "llava:pixtral" and not calling.REPORTS:
        pytest.skip("transformers >= 5.20 tells where Pixtral's break tokens are")
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_trained_and_its_words_are_the_rows(name, monkeypatch):
    processor, config = collating_parts(name, monkeypatch)
    collator = GroundingCollator(processor, config)
    tokenizer = processor.tokenizer
    special = "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = collator([example(messages) for messages, _ in CHATS.values()])
        padding = batch["attention_mask"] == 0
        assert padding[:, 0 if side == "left" else -1].any()
        assert (batch["labels"][padding] == -100).all()
        for b, (kind, (_, answers)) in enumerate(CHATS.items()):
            ids, labels, rows = (
                batch[key][b] for key in ("input_ids", "labels", "gk_side_position")
            )
            learned = re.sub(special, " ", tokenizer.decode(labels[labels >= 0]))
            assert learned.split() == answers.split(), kind
            words = ids[rows[rows >= 0].long() + 1]
            assert tokenizer.decode(words).strip() == WORDS, kind
            image = batch["gk_image"][b]
            assert image[image >= 0].unique_consecutive().tolist() == [0, 1], kind
            assert set(image[batch["gk_side_inside"][b, 0]].tolist()) == {1}, kind
