"""Rows that are found in another program's tokens are those of our own collator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from groundkern.integrations.shared.records import grounded_example, supervision_of
from groundkern.integrations.shared.sequences import Picture, SequenceRows
from groundkern.trainer.data.images import SampleError
from tests.hf.collating import (
    IMAGE,
    PROCESSORS,
    SMALL,
    TOP_LEFT,
    GroundedExample,
    live,
    make_collator,
    make_config,
    make_region,
    token_bytes,
)

ANSWER = "The red patch, 红色 🙂, is in row 2."


def make(answers, phrases=(), *, images=(IMAGE,), questions=None, **more):
    """A conversation, and a region for each (turn, phrase)."""
    messages = []
    for number, answer in enumerate(answers):
        asked = "Where?" if questions is None else questions[number]
        images_here = [{"type": "image"}] * (len(images) if number == 0 else 0)
        messages.append(
            {"role": "user", "content": [*images_here, {"type": "text", "text": asked}]}
        )
        messages.append({"role": "assistant", "content": answer})
    regions = tuple(
        make_region(answers[turn // 2], phrase, turn=turn, boxes=(TOP_LEFT,))
        for turn, phrase in phrases
    )
    return GroundedExample(tuple(images), messages, regions, name="file:1", **more)


def foreign(example, given=None):
    """The example as a program's record gives it: texts alone, and sizes of images."""
    messages = [
        {
            "role": m["role"],
            "content": m["content"]
            if isinstance(m["content"], str)
            else "".join(part.get("text", "<image>") for part in m["content"]),
        }
        for m in example.messages
    ]
    sizes = [image.size for image in example.images]
    regions = [
        {
            "turn": r.turn,
            "char_span": [r.start, r.stop],
            "image": r.image,
            "coord": "unit",
            "box": list(r.boxes[0]),
        }
        for r in example.regions
    ]
    record = {"messages": messages, "regions": regions}
    return grounded_example(record, sizes, given or sizes, "file:1")


@pytest.fixture(params=["qwen", "llava"])
def family(request):
    return request.param


def rows_of(family, examples, *, side="right", **options):
    """(our collator's batch, the same found in its tokens, what was counted)."""
    wanted = make_collator(family, side=side, **options)(examples)
    plain = {name: x for name, x in wanted.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS[family](padding_side=side), make_config(family), **options)
    return wanted, maker([foreign(example) for example in examples], plain), maker.counts


def assert_same(wanted, found):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_has_the_rows_of_our_collator(family, side):
    examples = [
        make([ANSWER], [(1, "red patch"), (1, "红色 🙂")]),
        make(["A total of 1854."], [(1, "1854")], images=(SMALL,)),
        make(["No picture."], images=()),
    ]
    wanted, found, counts = rows_of(family, examples, side=side, lens=True, map_rows="phrase")
    assert_same(wanted, found)
    assert counts["side_rows"] > 5 and not counts["answers_unfound"]


@pytest.mark.parametrize(
    ("answers", "questions"),
    [
        (["Yes.", "Yes."], ["Is it red?", "Yes. Sure?"]),  # the second question has the answer
        (["Yes, it is. Sure?", "Yes"], ["Is it?", "Sure?"]),  # the answer has the next question
        (["user", "assistant"], ["Who?", "And who?"]),  # words of the template's own
        (["im", "end"], ["start", "vision"]),  # words of special tokens
    ],
)
def test_turns_are_told_apart(family, answers, questions):
    phrases = [(2 * i + 1, answer.split(".")[0].split(",")[0]) for i, answer in enumerate(answers)]
    example = make(answers, phrases, questions=questions)
    wanted, found, counts = rows_of(family, [example])
    assert_same(wanted, found)
    assert not counts["answers_unfound"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_several_images_and_turns_beside_a_sample_of_text(family, side):
    """Each region on its own image; the batch has images of three sizes and a row without any."""
    two = make(["The patch.", "The patch."], [(1, "patch"), (3, "patch")], images=(IMAGE, SMALL))
    second = replace(two.regions[1], image=1)
    examples = [
        make(["No picture, no patch."], images=()),
        replace(two, regions=(two.regions[0], second)),
        make([ANSWER], [(1, "red patch")], images=(SMALL,)),
    ]
    wanted, found, counts = rows_of(family, examples, side=side)
    assert_same(wanted, found)
    assert counts["side_rows"] >= 4 and not counts["answers_unfound"]


@pytest.mark.parametrize(
    ("answers", "left"),
    [(("Yes.", "Yes."), ""), (("yes.", "No, yes."), ""), (("Yes.", "No."), "No")],
)
def test_a_cut_on_the_left_gives_no_answer_the_rows_of_another(answers, left):
    """Questions and the first answer are gone: the tokens that are left are the second's."""
    words = [answer.split()[-1].strip(".") for answer in answers]
    example = make(answers, [(1, words[0]), (3, words[1])], questions=("Is it red?", "And here?"))
    batch = make_collator()([example])
    trained = (batch["labels"][0] != -100).nonzero()[:, 0]
    second = trained[(trained[1:] - trained[:-1]).argmax() + 1]
    visual = batch["input_ids"][0] == make_config("qwen").image_token_id
    keep = visual | (torch.arange(len(visual)) >= second - 1)
    plain = {n: x for n, x in batch.items() if not n.startswith("gk_")}
    plain |= {n: plain[n][:, keep] for n in ("input_ids", "attention_mask", "labels")}
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    found = maker([foreign(example)], plain)
    positions = [p + 1 for p in live(found["gk_side_position"][0])]
    shown = b"".join(token_bytes(make_collator(), found, 0, torch.tensor(positions).long()))
    assert shown.decode().strip() == left
    assert maker.counts["answers_unfound"] == maker.counts["regions_unfound"] == 2 - bool(left)


def test_supervised_tokens_are_the_words_of_the_regions():
    example = make([ANSWER], [(1, "patch"), (1, "红色 🙂")])
    wanted, found, _ = rows_of("qwen", [example])
    positions = [p + 1 for p in live(found["gk_side_position"][0])]
    shown = b"".join(token_bytes(make_collator(), wanted, 0, positions)).decode()
    assert shown.replace(" ", "") == "patch红色🙂"


def test_a_form_of_unicode_that_the_tokenizer_keeps_otherwise_is_found():
    composed, apart = "café is red", "cafe\u0301 is red"
    batch = make_collator()([make([composed], [(1, "café")])])
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    found = maker([foreign(make([apart], [(1, "cafe\u0301")]))], plain)
    assert_same(batch, found)


def test_a_cut_answer_has_no_rows_and_is_counted():
    example = make([ANSWER], [(1, "red patch")])
    batch = make_collator(max_length=len(make_collator()([example])["input_ids"][0]) - 8)([example])
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    found = maker([foreign(example)], plain)
    assert found["gk_side_position"].numel() == 0
    assert live(found["gk_text_position"][0]) == live(batch["gk_text_position"][0])
    assert maker.counts["answers_unfound"] == maker.counts["regions_unfound"] == 1


def test_an_answer_without_labels_is_context():
    example = make(["Yes, red.", "Yes, blue."], [(1, "red"), (3, "blue")])
    batch = make_collator()([example])
    first = (batch["labels"][0] != -100).nonzero()[:, 0]
    gap = int((first[1:] - first[:-1] > 1).nonzero()[0, 0])
    batch["labels"][0, first[: gap + 1]] = -100
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    found = maker([foreign(example)], plain)
    assert maker.counts["regions_untrained"] == 1
    labels = batch["labels"][0]
    assert live(found["gk_text_position"][0]) == ((labels != -100).nonzero()[:, 0] - 1).tolist()
    assert len(live(found["gk_side_position"][0])) == len(
        live(make_collator()([make(["Yes, blue."], [(1, "blue")])])["gk_side_position"][0])
    )


def test_more_or_fewer_visual_tokens_than_the_image_has_are_refused():
    example = make([ANSWER], [(1, "red patch")])
    plain = make_collator()([example])
    plain = {name: x for name, x in plain.items() if not name.startswith("gk_")}
    plain["image_grid_thw"] = plain["image_grid_thw"] * torch.tensor([1, 2, 1])
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    with pytest.raises(ValueError, match=r"file:1: images.*visual tokens"):
        maker([foreign(example)], plain)


def test_packed_rows_are_refused():
    plain = make_collator()([make([ANSWER])])
    plain = {name: x for name, x in plain.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS["qwen"](), make_config("qwen"))
    with pytest.raises(ValueError, match="a sample in each row"):
        maker([foreign(make([ANSWER]))] * 2, plain)
    del plain["attention_mask"]
    with pytest.raises(ValueError, match="without a mask"):
        maker([foreign(make([ANSWER]))], plain)


def test_geometry_is_that_of_what_the_processor_was_given():
    """LLaVA's crop of a wide image depends on its size, in which boxes do not count."""
    example = make([ANSWER], [(1, "red patch")])
    resized = GroundedExample(
        (IMAGE.resize((70, 56)),), example.messages, example.regions, name="file:1"
    )
    wanted = make_collator("llava")([resized])
    plain = {name: x for name, x in wanted.items() if not name.startswith("gk_")}
    maker = SequenceRows(PROCESSORS["llava"](), make_config("llava"))
    assert_same(wanted, maker([foreign(example, [(70, 56)])], plain))
    assert Picture((70, 56)).width == 70


def test_a_tables_nulls_are_nothing():
    row = {
        "regions": [{"text": "a", "box": [0, 0, 1, 1], "points": None, "image": None}],
        "words": None,
        "grounding_weight": None,
        "phrases": [],
    }
    assert supervision_of(row) == {"regions": [{"text": "a", "box": [0, 0, 1, 1]}]}
    assert supervision_of({"regions": '[{"text": "a"}]'}) == {"regions": [{"text": "a"}]}


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ({"text": "patch", "bx": [0, 0, 1, 1]}, r"file:1: `regions\[0\].*bx"),
        ({"text": "patch", "mask": "m.png"}, r"file:1: `regions\[0\].*mask"),
        ({"text": "patch", "box": [0, 0, 900, 10]}, r"file:1: `regions\[0\].*900"),
        ({"text": "nothing", "box": [0, 0, 9, 10]}, r"file:1: `regions\[0\].*nothing"),
    ],
)
def test_a_region_that_does_not_fit_is_named(region, said):
    record = {"messages": [{"role": "assistant", "content": ANSWER}], "regions": [region]}
    with pytest.raises(SampleError, match=said):
        grounded_example(record, [(140, 112)], [(140, 112)], "file:1")
