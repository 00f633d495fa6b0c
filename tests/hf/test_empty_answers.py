"""Item 6: an empty answer trains the end of its turn; answers are counted, and what is lost."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import GroundedExample, GroundingCollator
from tests.hf.collating import IMAGE, live, make_collator, make_dialogue, make_example
from tests.hf.families import FAMILIES

EMPTY = ["", "  \n", [], [{"type": "text", "text": ""}], None]


def answers_of(counts):
    return tuple(counts[name] for name in ("answers", "answers_empty", "answers_truncated"))


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_an_empty_answer_is_trained_in_every_family(name, empty):
    made = FAMILIES[name]
    processor = made.processor()
    collator = GroundingCollator(processor, made.model().config)
    example = make_example(empty)
    batch = collator([example])
    end = processor.tokenizer.eos_token_id
    trained = batch["labels"][0][batch["labels"][0] >= 0].tolist()
    assert trained[-1] == end
    assert trained.count(end) == 1
    assert not processor.tokenizer.decode(trained[:-1]).strip()
    assert live(batch["gk_text_position"][0])[-1] + 1 == int(
        (batch["labels"][0] == end).nonzero()[-1]
    )
    assert answers_of(collator.counts) == (1, 1, 0)


@pytest.mark.parametrize("empty", EMPTY)
def test_empty_answers_between_others_leave_these_as_they_are(empty):
    """Every turn has its own end, and nothing but the empty answer's end is trained more."""
    messages = make_dialogue("red patch", "", "row 2")
    messages[3]["content"] = empty
    collator = make_collator()
    batch = collator([GroundedExample((IMAGE,) * 3, messages)])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    decoded = collator.processor.tokenizer.decode(trained)
    assert decoded == "red patch<|im_end|><|im_end|>row 2<|im_end|>"
    assert answers_of(collator.counts) == (3, 1, 0)


def test_a_template_that_writes_no_empty_answer_teaches_nothing_by_it():
    """It is not refused: the other answers of the sample are as good as ever."""
    collator = make_collator()
    template = collator.processor.chat_template
    collator.processor.chat_template = template.replace(
        "{{ part['text'] }}", "{% if part['text'] | trim %}T:{{ part['text'] }}{% endif %}"
    )
    messages = make_dialogue("red patch", " ")
    batch = collator([GroundedExample((IMAGE,) * 2, messages)])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert collator.processor.tokenizer.decode(trained) == "red patch<|im_end|>"
    assert answers_of(collator.counts) == (2, 1, 0)


def test_answers_of_which_truncation_leaves_nothing_are_counted():
    messages = make_dialogue("red patch", "row 2 of the grid", "")
    example = GroundedExample((IMAGE,) * 3, messages)
    whole = make_collator()
    batch = whole([example])
    assert answers_of(whole.counts) == (3, 1, 0)
    seen = set()
    for length in range(66, batch["input_ids"].shape[1]):
        collator = make_collator(max_length=length)
        cut = collator([example])
        assert answers_of(collator.counts)[:2] == (3, 1)
        decoded = collator.processor.tokenizer.decode(cut["labels"][0][cut["labels"][0] >= 0])
        lost = (not decoded) + (len(decoded) <= len("red patch<|im_end|>"))
        assert collator.counts["answers_truncated"] == lost
        seen.add(lost)
    assert seen == {0, 1, 2}


def test_an_image_within_an_answer_is_not_trained():
    parts = [{"type": "text", "text": "red "}, {"type": "image"}, {"type": "text", "text": " row"}]
    messages = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": parts}]
    collator = make_collator()
    batch = collator([GroundedExample((IMAGE,), messages)])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert not (trained == collator.config.image_token_id).any()
    decoded = collator.processor.tokenizer.decode(trained)
    assert decoded.startswith("red ")
    assert decoded.endswith(" row<|im_end|>")
    assert torch.equal(trained, batch["input_ids"][0][batch["labels"][0] >= 0])
