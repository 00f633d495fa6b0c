"""Answers that are context (`"train": False`), what tools say, and tools: labels and rows."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf.data.example import GroundedExample, Phrase
from tests.hf.collating import IMAGE, live, make_collator, make_region, token_bytes

FIRST, SECOND = "The red patch.", "A blue patch."


def dialogue(*, first: bool = True, second: bool = True, **more) -> GroundedExample:
    """Two answers with a region and a phrase each."""
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": FIRST, **({} if first else {"train": False})},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": SECOND, **({} if second else {"train": False})},
    ]
    regions = (make_region(FIRST, "red"), make_region(SECOND, "blue", turn=3))
    phrases = (Phrase(1, 4, 7), Phrase(3, 2, 6))
    return GroundedExample((IMAGE,), messages, regions, phrases=phrases, name="a:1", **more)


def said(collator, batch, positions) -> str:
    return b"".join(token_bytes(collator, batch, 0, positions)).decode()


@pytest.mark.parametrize("trained", ["first", "second"])
def test_an_untrained_answer_has_no_labels_and_no_rows(trained):
    collator = make_collator(map_rows="phrase_predictor", lens=True)
    batch = collator([dialogue(first=trained == "first", second=trained == "second")])
    answer, word = {"first": (FIRST, "red"), "second": (SECOND, "blue")}[trained]
    labelled = (batch["labels"][0] >= 0).nonzero()[:, 0]
    assert said(collator, batch, labelled[:-1]) == answer
    end = collator.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert batch["labels"][0][labelled[-1]] == end
    for rows in ("gk_side_position", "gk_map_position", "gk_phrase_position"):
        after = torch.tensor(live(batch[rows][0])) + 1
        assert said(collator, batch, after).strip() == word
    assert batch["gk_side_inside"].shape[1] == 1
    alone = [collator.counts[f"{name}_untrained"] for name in ("answers", "regions", "phrases")]
    assert alone == [1, 1, 1]
    assert collator.counts["answers"] == 1
    assert collator.counts["phrases_truncated"] == 0
    labels = {int(each) for each in batch["gk_lens_label"][0] if each >= 0}
    assert len(labels) == 1


def test_context_does_not_change_what_the_model_reads():
    plain, context = (make_collator()([dialogue(first=first)]) for first in (True, False))
    assert torch.equal(plain["input_ids"], context["input_ids"])
    kept = context["labels"] >= 0
    assert torch.equal(context["labels"][kept], plain["labels"][kept])
    assert int(kept.sum()) < int((plain["labels"] >= 0).sum())


def test_nothing_trained_leaves_no_row():
    collator = make_collator()
    batch = collator([dialogue(first=False, second=False)])
    assert not (batch["labels"] >= 0).any()
    assert (collator.counts["text_rows"], collator.counts["side_rows"]) == (0, 0)


def with_tool(said: str = '{"price": 5}') -> GroundedExample:
    messages = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": '{"name": "price"}'},
        {"role": "tool", "content": said},
        {"role": "assistant", "content": "Five."},
    ]
    return GroundedExample((), messages, name="a:1")


def test_what_a_tool_says_is_context():
    collator = make_collator()
    batch = collator([with_tool()])
    assert '<|im_start|>tool\n{"price": 5}<|im_end|>' in collator.processor.tokenizer.decode(
        batch["input_ids"][0]
    )
    end = collator.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labelled = ((batch["labels"][0] >= 0) & (batch["labels"][0] != end)).nonzero()[:, 0]
    assert said(collator, batch, labelled) == '{"name": "price"}Five.'


@pytest.fixture
def template(monkeypatch):
    """Sets the template of a collator's processor."""

    def use(collator, text: str):
        monkeypatch.setattr(collator.processor, "chat_template", text)
        return collator

    return use


PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
TOOLS = [{"name": "price", "parameters": {}}]


def test_tools_reach_a_template_that_knows_them(template):
    collator = template(make_collator(), "{{ tools | tojson if tools }}" + PLAIN)
    example = with_tool()
    batch = collator([GroundedExample((), example.messages, tools=tuple(TOOLS), name="a:1")])
    text = collator.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith('[{"name": "price", "parameters": {}}]<|im_start|>')
    end = collator.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labelled = ((batch["labels"][0] >= 0) & (batch["labels"][0] != end)).nonzero()[:, 0]
    assert said(collator, batch, labelled) == '{"name": "price"}Five.'


def test_templates_that_leave_something_out_are_refused(template):
    example = with_tool()
    known = GroundedExample((), example.messages, tools=tuple(TOOLS), name="a:1")
    with pytest.raises(ValueError, match=r"`a:1: tools`.* a chat template that names tools"):
        make_collator()([known])
    deaf = PLAIN.replace("{% for message in messages %}", "{% for message in messages if "
                         "message['role'] != 'tool' %}")  # fmt: skip
    with pytest.raises(ValueError, match=r"`a:1: messages\[2\]`.*takes messages of a tool"):
        template(make_collator(), deaf)([example])
    hidden = GroundedExample((), example.messages, tools=({"name": "<|im_end|>"},), name="a:1")
    with pytest.raises(ValueError, match=r"`a:1: tools\[0\]`.*without special tokens"):
        template(make_collator(), "{{ tools | tojson if tools }}" + PLAIN)([hidden])
