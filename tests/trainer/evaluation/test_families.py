"""Answers and figures of batches in every family: those of each sample alone (fp32)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from groundkern.hf import GroundedExample, Region, detach
from groundkern.trainer.evaluation.generating import Answerer, stop_tokens
from groundkern.trainer.evaluation.grounding import Grounding
from groundkern.trainer.evaluation.questions import Asking
from tests.hf.families import FAMILIES


def examples() -> list[GroundedExample]:
    """One image, two of other sizes, none, several turns: no two prompts are of one length."""
    noise = np.random.default_rng(0)
    sizes = ((97, 150), (60, 61), (120, 80))
    a, b, c = (Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes)

    def chat(*texts: str) -> list[dict]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    region = Region(1, 4, 13, 0, boxes=((0.1, 0.1, 0.6, 0.5),))
    return [
        GroundedExample((a,), chat("Where?", "The red patch."), regions=(region,), name="one"),
        GroundedExample((b, c), chat("What is the total?", "65 million"), name="two"),
        GroundedExample((), chat("Read the word under the box.", "Call me"), name="none"),
        GroundedExample((c,), chat("Coal?", "65 tons", "In 1801?", "No"), name="turns"),
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_batches_answer_as_single_questions_do(name):
    built = FAMILIES[name]
    model, processor = built.model(), built.processor()
    asking = Asking(processor)
    answerer = Answerer(model, processor, max_new_tokens=5)
    questions = [asking.question(example) for example in examples()]
    assert [len(question.images) for question in questions] == [1, 2, 0, 1]
    together = answerer.answer(answerer.inputs(questions))
    alone = [answerer.answer(answerer.inputs([question]))[0] for question in questions]
    assert together == alone
    grounding = Grounding(model, processor)  # attached, it answers alike
    grounding.examine(examples())
    assert answerer.answer(answerer.inputs(questions)) == together
    both = grounding.measure(grounding.inputs(examples()[:2]))
    (one,) = grounding.measure(grounding.inputs(examples()[:1]))
    assert both[0].keys() == one.keys() >= {"attention_ratio", "roc_auc", "answer_loss"}
    assert "attention_ratio" not in both[1]
    for figure, pair in one.items():
        assert both[0][figure] == pytest.approx(pair, rel=1e-4), figure
    detach(model)


def test_bfloat16_answers_too():
    built = FAMILIES["llava"]
    model, processor = built.model().to(torch.bfloat16), built.processor()
    asking, answerer = Asking(processor), Answerer(model, processor, max_new_tokens=3)
    said = answerer.answer(answerer.inputs([asking.question(e) for e in examples()]))
    assert [answer.tokens for answer in said] == [3] * 4
    grounding = Grounding(model, processor)
    grounding.examine(examples())
    (figures,) = grounding.measure(grounding.inputs(examples()[:1]))
    assert figures["attention_mass"][1] == 1
    detach(model)


def test_a_turn_ends_with_what_the_template_writes_behind_an_answer():
    """A model saved without generation settings, whose tokenizer ends texts with another token."""
    built = FAMILIES["qwen2_5_vl"]
    model, processor = built.model(), built.processor()
    token = processor.tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = "<|endoftext|>"
    assert stop_tokens(model, processor) == sorted({token("<|im_end|>"), token("<|endoftext|>")})
    answerer = Answerer(model, processor, max_new_tokens=4)
    ids = [token("a"), token("<|im_end|>"), token("b"), token("<|endoftext|>")]
    answer = answerer._read(ids)
    assert (answer.text, answer.tokens, answer.ended) == ("a", 2, True)
    assert answerer._read(ids[:1]).ended is False


def test_special_tokens_are_no_text():
    asking = Asking(FAMILIES["qwen2_5_vl"].processor())
    assert asking.plain(" row 2<|im_end|> <|vision_start|>\n") == "row 2"
    assert asking.plain("<|im_<|im_end|>end|>4") == "4"
