"""Boxes in answers become regions, and are written as another family writes them."""

from __future__ import annotations

import argparse
import json
import pickle

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from groundkern.hf.data.example import message_text
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.places.styles import STYLES
from groundkern.trainer.places.writing import Writer
from groundkern.trainer.prepare.arguments import add_style
from groundkern.trainer.prepare.boxes.finding import Reading
from groundkern.trainer.prepare.boxes.settings import BoxSettings, add_arguments

SIZE = (200, 100)
QWEN2 = (
    "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|> and "
    "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(0,0),(1000,500)<|box_end|> play"
)
DOG, CAT = [20, 20, 100, 80], [0, 0, 200, 50]


def chat(answer: str, question: str = "Where?", images: int = 1, **fields) -> dict:
    asked = [*([{"type": "image"}] * images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"images": ["a.png"] * images, "messages": messages, **fields}


def made(record: dict, reading=None, style: str | None = None, tie: str = "both", sizes=(SIZE,)):
    """(the record, its counts, the tied words and places of its answer)."""
    writer = None if style is None else Writer(style)
    work = BoxSettings(reading or Reading(), writer, tie)
    before = json.dumps(record)
    found, counts = work(record, sizes, "a:1")
    assert json.dumps(record) == before  # the caller's own is left alone
    ties = []
    for region in found.get("regions", ()):
        text = message_text(found["messages"][region.get("turn", 1)])
        words = text[slice(*region["char_span"])] if "char_span" in region else region["text"]
        ties.append((words, region.get("box") or region.get("points") or region.get("polygon")))
    return found, counts, ties


def answer(record: dict) -> str:
    return record["messages"][-1]["content"]


def test_labels_and_numbers_are_tied_to_the_box():
    found, counts, ties = made(chat(QWEN2))
    wanted = [
        ("a dog", DOG),
        ("(100,200),(500,800)", DOG),
        ("a cat", CAT),
        ("(0,0),(1000,500)", CAT),
    ]
    assert ties == wanted
    assert counts == {"boxes_read": 2, "regions": 4}
    assert answer(found) == QWEN2
    assert made(chat(QWEN2), tie="label")[2] == wanted[::2]
    assert made(chat(QWEN2), tie="numbers")[2] == wanted[1::2]
    plain = chat("click <|box_start|>(100,200),(500,800)<|box_end|>")
    assert made(plain, tie="label")[2] == [("(100,200),(500,800)", DOG)]


def test_regions_are_those_of_the_format(tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    found, _, _ = made(chat(QWEN2, regions=[{"text": "play", "points": [[5, 5]]}]))
    sample = parse_sample(found, root=tmp_path, where="a:1")
    assert [region.boxes for region in sample.regions][1] == ((0.1, 0.2, 0.5, 0.8),)
    assert len(sample.regions) == 5


def test_boxes_that_share_a_label_are_its_union():
    text = "<ref>dogs</ref><box>[[100, 200, 500, 800], [0, 0, 1000, 500]]</box>"
    assert [tie for tie in made(chat(text))[2] if tie[0] == "dogs"] == [
        ("dogs", DOG),
        ("dogs", CAT),
    ]


JSON = '```json\n[\n\t{"bbox_2d": [20, 20, 100, 80], "label": "a \\"dog\\""}\n]\n```'


def test_numbers_that_say_nothing_need_a_unit():
    _, counts, ties = made(chat(JSON))
    assert (ties, counts) == ([], {"boxes_unknown": 1})
    for reading in (Reading("auto", "pixel"), Reading("qwen2.5", "pixel")):
        ties = made(chat(JSON), reading)[2]
        assert ties == [('a \\"dog\\"', DOG), ("[20, 20, 100, 80]", DOG)]
    unit = chat("It is at [0.1, 0.2, 0.5, 0.8].")
    assert made(unit, Reading("unit"))[2] == [("[0.1, 0.2, 0.5, 0.8]", DOG)]
    assert made(unit, Reading("auto", "unit"))[2] == [("[0.1, 0.2, 0.5, 0.8]", DOG)]
    square = chat("[0.1, 0.35, 0.5, 0.65]")  # of an image of 200 x 100 padded to 200 x 200
    assert made(square, Reading("llava"))[2] == [("[0.1, 0.35, 0.5, 0.65]", DOG)]


def test_a_named_style_and_a_unit_say_what_tags_count():
    """ms-swift writes Qwen2.5-VL's pixels between Qwen2-VL's tags."""
    text = "<|box_start|>(20,20),(100,80)<|box_end|>"
    assert made(chat(text), Reading("qwen2", "pixel"))[2] == [("(20,20),(100,80)", DOG)]
    assert made(chat(text), Reading("auto", "pixel"))[2][0][1] == [4, 2, 20, 8]  # as tags say
    assert made(chat(text), Reading("internvl"))[2][0][1] == [4, 2, 20, 8]
    assert made(chat(text), Reading("paligemma"))[2] == []


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("<box>[[500, 200, 100, 800]]</box>", {"boxes_inverted": 1}),
        ("<box>[[100, 200, 100, 800]]</box>", {"boxes_inverted": 1}),
        ("<box>[[100, 200, 1500, 800]]</box>", {"boxes_outside": 1}),
        ("<box>[[-100, 200, 500, 800]]</box>", {"boxes_outside": 1}),
        ("<loc9000><loc9000><loc9999><loc9999> x", {"boxes_outside": 1}),
        ('<point x="101.5" y="5">x</point>', {"boxes_outside": 1}),
        ("<box>[[1, 2, 3]]</box>", {}),
        ("[1, 2, 3, 4]", {"boxes_unknown": 1}),
        ("The sum of (3, 4) and 12, 15, 18, 20", {}),
    ],
)
def test_what_is_no_box_of_the_image_is_counted_and_the_sample_stays(text, counts):
    found, mine, ties = made(chat(text))
    assert (ties, mine) == ([], counts)
    assert found == chat(text)


def test_a_box_that_sticks_out_a_little_is_cut():
    text = "<box>[[100, 200, 1005, 800]]</box>"
    assert made(chat(text))[2] == [("[100, 200, 1005, 800]", [20, 20, 200, 80])]
    assert made(chat(text), Reading(overhang=0))[1] == {"boxes_outside": 1}


def test_of_several_images_the_text_has_to_say_which():
    sizes = (SIZE, (400, 400))
    _, counts, ties = made(chat("<box>[[1, 2, 3, 4]]</box>", images=2), sizes=sizes)
    assert (ties, counts) == ([], {"boxes_of_which": 1})
    text = '<points coords="1 1 500 500;2 1 250 500">dogs</points>'
    found, counts, ties = made(chat(text, images=2), sizes=sizes)
    assert [region["image"] for region in found["regions"]] == [0, 0, 1, 1]
    assert ties[1] == ("1 500 500", [[100, 50]])
    assert ties[3] == ("1 250 500", [[100, 200]])
    assert made(chat("<box>[[1, 2, 3, 4]]</box>", images=0), sizes=())[1] == {"boxes_without": 1}


def test_only_answers_have_regions_and_each_its_turn():
    record = chat("<box>[[100, 200, 500, 800]]</box>", "What is at <box>[[0, 0, 1000, 500]]</box>?")
    record["messages"] += [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<box>[[0, 0, 1000, 500]]</box>"},
    ]
    found, _, ties = made(record)
    assert ties == [("[100, 200, 500, 800]", DOG), ("[0, 0, 1000, 500]", CAT)]
    assert [region["turn"] for region in found["regions"]] == [1, 3]


def test_regions_that_are_there_stay_and_are_not_made_again():
    record = chat(QWEN2, regions=[{"char_span": [20, 25], "box": [1, 2, 3, 4]}])
    _, counts, ties = made(record)
    assert ties[0] == ("a dog", [1, 2, 3, 4])
    assert [words for words, _ in ties].count("a dog") == 1
    assert counts["regions"] == 3


STYLED = {
    "qwen": "<ref>a dog</ref><box>(100,200),(500,800)</box> and "
    "<ref>a cat</ref><box>(0,0),(1000,500)</box> play",
    "internvl": "<ref>a dog</ref><box>[[100, 200, 500, 800]]</box> and "
    "<ref>a cat</ref><box>[[0, 0, 1000, 500]]</box> play",
    "kosmos2": "<phrase>a dog</phrase><object><patch_index_0195><patch_index_0815></object> and "
    "<phrase>a cat</phrase><object><patch_index_0000><patch_index_0511></object> play",
    "qwen3": '[{"bbox_2d": [100, 200, 500, 800], "label": "a dog"}] and '
    '[{"bbox_2d": [0, 0, 1000, 500], "label": "a cat"}] play',
    "per_mille": "a dog [100, 200, 500, 800] and a cat [0, 0, 1000, 500] play",
    "pixel": "a dog [20, 20, 100, 80] and a cat [0, 0, 200, 50] play",
}
THERE = [
    {"text": "play", "box": [0, 0, 9, 9]},
    {"text": "dog", "polygon": [[1, 1], [5, 5], [9, 1]]},
    {"text": "a", "occurrence": 1, "points": [[3, 3]]},  # of "and"
]


@pytest.mark.parametrize(("style", "text"), STYLED.items())
def test_boxes_are_written_as_another_family_does_and_spans_move(style, text):
    phrases = [{"text": "a cat", "subject": "cat"}, {"text": "play"}]
    found, counts, ties = made(chat(QWEN2, regions=THERE, phrases=phrases), style=style)
    assert answer(found) == text
    assert counts["boxes_rewritten"] == 2
    assert ties[:2] == [("play", [0, 0, 9, 9]), ("dog", [[1, 1], [5, 5], [9, 1]])]
    assert ties[3][0] == "a dog"
    assert ties[5] == ("a cat", CAT)
    spans = [text[slice(*phrase["char_span"])] for phrase in found["phrases"]]
    assert spans == ["a cat", "play"]
    assert found["phrases"][0]["subject"] == "cat"


def test_questions_are_written_too_and_parts_keep_their_places():
    record = chat("Yes.", "Is <ref>a dog</ref><box>[[100, 200, 500, 800]]</box> there?")
    record["messages"][0]["content"].append({"type": "text", "text": " Say yes."})
    record["messages"][0]["content"].insert(1, {"type": "text", "text": "Look: "})
    found, counts, ties = made(record, style="qwen2")
    texts = [part.get("text") for part in found["messages"][0]["content"]]
    dog = QWEN2.partition(" and")[0]
    assert texts == [None, "Look: ", f"Is {dog} there?", " Say yes."]
    assert (counts, ties) == ({"boxes_rewritten": 1}, [])


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("internvl", "Is <ref>a dog</ref> at <box>[[0, 0, 1000, 500]]</box>?"),
        ("qwen3", 'Is a dog at [{"bbox_2d": [0, 0, 1000, 500]}]?'),
        ("per_mille", "Is a dog at [0, 0, 1000, 500]?"),
        ("qwen2", "Is <|object_ref_start|>a dog<|object_ref_end|> at "
         "<|box_start|>(0,0),(1000,500)<|box_end|>?"),
    ],
)  # fmt: skip
def test_references_without_a_box_and_boxes_without_a_label(style, text):
    given = QWEN2.partition("<|box_start|>")[0] + " at <|box_start|>(0,0),(1000,500)<|box_end|>?"
    found, _, ties = made(chat(f"Is {given}", regions=[{"text": "a dog", "box": DOG}]), style=style)
    assert answer(found) == text
    assert ties[0] == ("a dog", DOG)


def test_a_message_is_written_anew_as_a_whole_or_not():
    text = "<ref>a</ref><box>[[100, 200, 500, 800]]</box> <ref>b</ref><box>[[5, 2, 1, 8]]</box>"
    found, counts, ties = made(chat(text), style="qwen3")
    assert answer(found) == text
    assert (counts["boxes_kept"], counts["boxes_inverted"], len(ties)) == (2, 1, 2)


def test_json_becomes_tags_without_its_list_and_fence():
    found, _, ties = made(chat(f"Here:\n{JSON}\nDone."), Reading("qwen2.5", "pixel"), "internvl")
    assert answer(found) == 'Here:\n<ref>a "dog"</ref><box>[[100, 200, 500, 800]]</box>\nDone.'
    assert ties == [('a "dog"', DOG), ("[100, 200, 500, 800]", DOG)]


def test_json_of_the_same_keys_keeps_everything_but_its_numbers():
    text = JSON.replace('"label"', '"score": 0.5, "label"')
    found, _, _ = made(chat(text), Reading("qwen2.5", "pixel"), "qwen3")
    assert answer(found) == text.replace("[20, 20, 100, 80]", "[100, 200, 500, 800]")
    found, counts, _ = made(chat(text), Reading("qwen2.5", "pixel"), "internvl")
    assert (answer(found), counts["boxes_kept"]) == (text, 1)  # tags have no score


@pytest.mark.parametrize(
    ("text", "style"),
    [
        (QWEN2, "molmo"),  # which has no boxes
        ('<point x=1 y=3 "box_2d":[1,2,3,4]></point>', "per_mille"),  # one within the other
        ("<ref>a</ref><box>[[500, 200, 100, 800]]</box>", "qwen3"),  # no place
        ('[{"box_2d": [200, 100, 800, 500], "label": "a</ref>"}]', "internvl"),
    ],
)
def test_what_the_style_cannot_say_stays_as_it_is(text, style):
    found, counts, _ = made(chat(text), style=style)
    assert answer(found) == text
    assert counts["boxes_kept"] >= 1
    assert "boxes_rewritten" not in counts


@pytest.mark.parametrize("style", [name for name, style in STYLES.items() if style.has_labels])
def test_a_text_that_is_written_so_already_is_left_alone(style):
    from groundkern.trainer.places.layouts import Place

    places = [Place((0.1, 0.2, 0.5, 0.8), "a dog"), Place((0, 0, 1, 0.5), "a cat")]
    if STYLES[style].box is None:
        places = [Place(place.numbers[:2], place.label) for place in places]
    text = STYLES[style].write(places, SIZE).text
    reading = Reading(style, "pixel" if STYLES[style].in_pixels else None)
    found, _, ties = made(chat(text), reading, style)
    assert answer(found) == text
    assert [tie[0] for tie in ties][::2] == ["a dog", "a cat"]


quick = settings(
    max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
pieces = st.sampled_from(
    [
        "<ref>a dog</ref><box>[[100, 200, 500, 800]]</box>",
        "<ref>a cat</ref><box>[[0, 0, 1000, 500], [1, 2, 300, 400]]</box>",
        "<box>[[100, 200, 500, 800]]</box>",
        "<box>[[500, 200, 100, 800]]</box>",
        *(" and ", ", ", " ; ", "é", "word", "\n", "[", "]", "<ref>", "</box>", "{"),
    ]
)


@quick
@given(
    st.lists(pieces, min_size=1, max_size=8).map("".join),
    st.sampled_from(list(STYLES)),
    st.data(),
)
def test_spans_outside_of_boxes_keep_their_words(text, style, data):
    writer = Writer(style)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    record = chat(text, regions=[{"char_span": [start, stop], "points": [[1, 1]]}])
    found, _ = BoxSettings(Reading(), writer)(record, [SIZE], "a:1")
    first, last = found["regions"][0]["char_span"]
    assert 0 <= first < last <= len(answer(found))
    if not any(sign in text[start:stop] for sign in "<>[]()0123456789"):
        inside = text.rfind("<", 0, start) > text.rfind(">", 0, start)
        if not inside:
            assert answer(found)[first:last].replace("&", "") == text[start:stop]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    add_style(parser, default="keep", text="boxes are written")
    parser.add_argument("--overhang", type=float, default=0.01)
    return parser.parse_args(words)


@pytest.fixture
def qwen(model):
    return str(model)


def test_pixels_of_the_processor_become_pixels_of_the_image(qwen):
    work = BoxSettings.of(arguments("--boxes", "qwen2.5", "--model", qwen))
    assert pickle.loads(pickle.dumps(work)) == work
    text = '[{"bbox_2d": [28, 14, 84, 42], "label": "dog"}]'
    found, _ = work(chat(text), [(100, 50)], "a:1")  # 112 x 56 for the model
    assert [region["box"] for region in found["regions"]] == [[25, 12.5, 75, 37.5]] * 2
    work = BoxSettings.of(arguments("--coord", "resized", "--model", qwen))
    assert work(chat(text), [(100, 50)], "a:1")[0] == found
    work = BoxSettings.of(arguments("--box-style", "auto", "--model", qwen))
    found, _ = work(chat("<ref>dog</ref><box>[[250, 250, 750, 750]]</box>"), [(100, 50)], "a:1")
    assert answer(found) == text


def test_an_image_that_the_processor_refuses_has_no_place(qwen):
    text = '[{"bbox_2d": [0, 0, 9, 9], "label": "dog"}]'
    work = BoxSettings.of(arguments("--boxes", "qwen2.5", "--model", qwen))
    assert work(chat(text), [(1, 300)], "a:1") == (chat(text), {"boxes_outside": 1})
    work = BoxSettings.of(arguments("--box-style", "auto", "--model", qwen))
    tags = chat("<ref>dog</ref><box>[[0, 0, 9, 9]]</box>")
    found, counts = work(tags, [(1, 300)], "a:1")
    assert (answer(found), counts["boxes_kept"]) == (answer(tags), 1)


def test_settings_of_the_command_line(qwen, tmp_path):
    other = str(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    BoxSettings.of(arguments("--boxes", "qwen2.5", "--box-style", "qwen3", "--model", qwen))
    assert BoxSettings.of(arguments()) == BoxSettings()
    off = BoxSettings.of(arguments("--boxes", "none"))
    assert off(chat(QWEN2), [SIZE], "a:1") == (chat(QWEN2), {})
    for words, message in [
        (("--boxes", "x"), r"`--boxes`: expected one of auto, none, per_mille, .*, got 'x'"),
        (("--box-style", "x"), r"`--box-style`: expected one of per_mille, .*, got 'x'"),
        (("--boxes", "none", "--box-style", "qwen3"), "which reads none"),
        (("--boxes", "qwen2.5"), "`--boxes qwen2.5`: expected --model"),
        (("--coord", "resized"), "`--coord resized`: expected --model"),
        (("--box-style", "auto"), "auto`: expected --model"),
        (("--coord", "resized", "--box-style", "auto", "--model", other), "which writes qwen3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            BoxSettings.of(arguments(*words))


def test_a_file_is_judged_before_the_work_begins():
    small = [(chat("[0.1, 0.2, 0.5, 0.8]"), [SIZE], f"a.json:{i}") for i in range(3)]
    (told,) = BoxSettings().warnings(small)
    assert told.startswith("a.json:0: numbers of 3 boxes or points never leave [0, 1]")
    assert BoxSettings(Reading("unit")).warnings(small) == []
    large = [(chat("[100, 200, 500, 800]"), [(3000, 2000)], f"a.json:{i}") for i in range(3)]
    (told,) = BoxSettings(Reading("auto", "pixel")).warnings(large)
    assert "probably thousandths" in told
    tagged = [(chat("<box>(0.1,0.2),(0.5,0.8)</box>"), [SIZE], "a.json:4")]
    (told,) = BoxSettings().warnings(tagged)
    assert "never leave [0, 1]: probably fractions" in told
    assert "(--boxes STYLE --coord unit); taken for thousandths" in told
    assert BoxSettings.read_as("qwen", "unit", None).warnings(tagged) == []
    small = [(chat('{"bbox_2d": [10, 20, 50, 80]}'), [SIZE], "a.json:5")]
    (told,) = BoxSettings(prefix="--data.").warnings(small)
    assert "(--data.coord pixel), or pixels of what the model's processor makes of the" in told
    bad = [(chat("<box>[[5, 2, 1, 8]]</box>"), [SIZE], "a.json:7")]
    (told,) = BoxSettings().warnings(bad)
    assert told == (
        "a.json:7: the first of boxes in messages with swapped corners or no area, left out"
    )
    assert BoxSettings(None).warnings(bad) == []
