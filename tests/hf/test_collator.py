"""The collator: rows of every loss, truncation, padding, and errors that name the sample."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern.hf.data import sequences
from groundkern.hf.data.batch import FIELDS
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Region, Word
from groundkern.maps import dequantise, patch_grid, target_map
from tests.hf.collating import (
    EVERYWHERE,
    IMAGE,
    SMALL,
    TOP_LEFT,
    live,
    make_collator,
    make_config,
    make_dialogue,
    make_example,
    make_region,
    token_bytes,
)
from tests.hf.families import FAMILIES


def test_side_sets_hold_the_union_of_regions_on_a_token():
    answer = "The red patch is in row 2"
    regions = [
        make_region(answer, "red patch", boxes=((0, 0, 0.2, 0.25),)),
        make_region(answer, "patch is", boxes=((0.8, 0.75, 1, 1),)),
        make_region(answer, "row", boxes=(), points=((0.5, 0.1), (0.1, 0.9))),
        make_region(
            answer, "row", boxes=(), polygons=(((0.8, 0), (1, 0), (1, 0.25), (0.8, 0.25)),)
        ),
    ]
    collator = make_collator()
    batch = collator([make_example(answer, regions)])
    columns = batch["gk_map_columns"][0].long()
    assert (batch["gk_image"][0][columns] == 0).all()
    seen = {}
    for row, number in zip(batch["gk_side_position"][0], batch["gk_side_set"][0]):
        (piece,) = token_bytes(collator, batch, 0, [row + 1])
        inside = batch["gk_side_inside"][0, number]
        assert not inside[batch["gk_image"][0] < 0].any()
        seen[piece.strip().decode()] = inside[columns].nonzero()[:, 0].tolist()
    assert seen == {"red": [0], "patch": [0, 19], "is": [19], "row": [2, 4, 15]}
    assert batch["gk_side_inside"].shape[1] == 4
    assert collator.counts["side_rows"] == 4


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, [b" patch", b" patch", b"ow"]), ({"map_rows": "last"}, [b".", b".", b" 2"])],
    ids=["default", "last"],
)
def test_map_rows_belong_to_the_last_content_token_of_each_answer_and_image(options, wanted):
    answers = ["The red patch.", "row 2 "]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": answers[1]},
    ]
    regions = (
        make_region(answers[0], "red", image=0),
        make_region(answers[0], "patch", image=0, boxes=((0.8, 0.75, 1, 1),)),
        make_region(answers[0], "patch", image=1, boxes=((0, 0, 1, 0.3),)),
        make_region(answers[1], "2", image=1, turn=3, boxes=(), points=((0.9, 0.9),)),
    )
    collator = make_collator(**options)
    batch = collator([GroundedExample((IMAGE, SMALL), messages, regions)])
    assert live(batch["gk_map_image"][0]) == [0, 1, 1]
    pieces = token_bytes(collator, batch, 0, live(batch["gk_map_position"][0]))
    assert pieces == wanted
    tokens = live(batch["gk_map_token_position"][0])
    assert token_bytes(collator, batch, 0, tokens) == [b".", b".", b" 2"]
    columns = batch["gk_map_columns"][0].long()
    assert (columns.diff() > 0).all()
    assert batch["gk_image"][0][columns].tolist() == [0] * 20 + [1] * 6
    targets = dequantise(batch["gk_map_target"][0])
    assert targets.sum(-1).tolist() == pytest.approx([1, 1, 1])
    on_target = [(t == t.max()).nonzero()[:, 0].tolist() for t in targets]
    assert on_target == [[0, 19], [20, 21], [25]]
    assert not targets[0, 20:].any()
    assert not targets[1:, :20].any()


def test_a_traced_line_is_a_target_map_and_a_side_set():
    answer = "The red patch is in row 2"
    line = ((0.1, 0.125), (0.9, 0.125), (0.9, 0.9))
    regions = [make_region(answer, "row", boxes=(), polylines=(line,))]
    batch = make_collator()([make_example(answer, regions)])
    (target,) = dequantise(batch["gk_map_target"][0])
    columns = batch["gk_map_columns"][0].long()
    grid = patch_grid(4, 5)
    assert len(columns) == 20
    torch.testing.assert_close(target, target_map(grid, polylines=[line]), rtol=0, atol=1e-6)
    assert target.argsort(descending=True, stable=True)[:8].sort().values.tolist() == [
        *(0, 1, 2, 3, 4, 9, 14, 19)
    ]
    assert batch["gk_side_inside"][0, 0, columns].nonzero()[:, 0].tolist() == [
        *(0, 1, 2, 3, 4, 9, 14, 19)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_row_of_a_one_token_answer_is_the_last_of_the_question(side):
    """In each turn, beside a longer sample, and where nothing else of the answer is left."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "4"},
    ]
    regions = (make_region("7", "7"), make_region("4", "4", turn=3))
    example = GroundedExample((IMAGE,), messages, regions)
    longer = make_example("The red patch. " * 20, images=())
    length = make_collator()([example])["input_ids"].shape[1]
    cuts = {None: 2, length - 2: 2, length - 3: 1}  # "<|im_end|>\n" and then the answer go
    for limit, rows in cuts.items():
        collator = make_collator(side=side, max_length=limit)
        batch = collator([longer, example])
        at, tokens = (live(batch[f"gk_map{x}_position"][1]) for x in ("", "_token"))
        assert [row + 1 for row in at] == tokens
        assert token_bytes(collator, batch, 1, tokens) == [b"7", b"4"][:rows]
        assert batch["labels"][1][at].tolist() == [-100] * rows  # it is no token of the answer
        assert set(at) <= set(live(batch["gk_text_position"][1]))  # and it predicts one
        assert collator.counts["map_rows_truncated"] == 2 - rows


def test_a_map_row_is_the_very_last_token_of_a_character_of_several():
    collator = make_collator(map_rows="last")
    batch = collator([make_example("red 🙂", [make_region("red 🙂", "red")])])
    (row,) = live(batch["gk_map_position"][0])
    assert token_bytes(collator, batch, 0, [row]) == ["🙂".encode()[-1:]]
    assert row == live(batch["gk_text_position"][0])[-1]  # and it predicts the end of the turn


def test_what_a_row_cannot_see_is_no_supervision_for_it():
    messages = make_dialogue("is red", "is red")
    regions = tuple(make_region("is red", "red", turn=turn, image=1) for turn in (1, 3))
    collator = make_collator()
    batch = collator([GroundedExample((IMAGE, SMALL), messages, regions)])
    last_visual = batch["gk_map_columns"].max().item()
    assert len(live(batch["gk_side_position"][0])) == len(live(batch["gk_map_position"][0])) == 1
    assert batch["gk_side_position"].max().item() > last_visual
    assert collator.counts["side_rows_without_region"] == 1
    assert collator.counts["map_rows_without_target"] == 1


@pytest.mark.parametrize("answer", ["red patch", "r"])
def test_rows_that_are_image_tokens_are_left_out_and_counted(answer):
    collator = make_collator("llava")
    collator.processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    content = [{"type": "image"}, {"type": "text", "text": answer}]
    region = Region(0, 0, len(answer), 0, (EVERYWHERE,))
    example = GroundedExample((IMAGE,), [{"role": "assistant", "content": content}], (region,))
    batch = collator([example])
    visual = set(batch["gk_image"][0].ge(0).nonzero()[:, 0].tolist())
    assert collator.counts["side_rows_on_image"] == 1
    assert not visual & set(live(batch["gk_side_position"][0]))
    alone = answer == "r"  # its map's row is the token before it, the image's last
    assert (collator.counts["map_rows_on_image"], collator.counts["map_rows"]) == (alone, not alone)
    assert not visual & set(live(batch["gk_map_position"][0]))
    assert max(visual) in live(batch["gk_text_position"][0])  # the text row stays


def test_regions_outside_a_center_crop_are_counted():
    wide = Image.new("RGB", (200, 100))
    answer = "red patch"
    regions = [
        make_region(answer, "red", boxes=((0, 0, 0.1, 0.1),)),
        make_region(answer, "patch", boxes=((0.4, 0.4, 0.6, 0.6),)),
    ]
    words = (Word("grid", (0, 0, 0.25, 0.2), 0), Word("grid", (0.3, 0.3, 0.4, 0.4), 0))
    collator = make_collator("llava")
    batch = collator([make_example(answer, regions, images=(wide,), words=words)])
    assert len(live(batch["gk_side_position"][0])) == 1
    assert len(live(batch["gk_word_position"][0])) == 1
    assert len(live(batch["gk_map_position"][0])) == 1
    for key in ("regions_outside", "side_rows_without_region", "words_dropped_outside"):
        assert collator.counts[key] == 1, key
    lost = make_collator("llava")
    lost([make_example(answer, regions[:1], images=(wide,))])
    assert lost.counts["map_rows_without_target"] == 1


def _rich():
    answer = "The red patch is in row 2, column 5."
    regions = (
        make_region(answer, "red patch"),
        make_region(answer, "column 5", boxes=((0.5, 0.5, 1, 1),)),
    )
    return make_example(answer, regions, words=(Word("grid", (0.3, 0.3, 0.5, 0.5), 0),))


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_padding_sides_and_neighbours_change_nothing_but_positions(family):
    alone = make_collator(family)([_rich()])
    length = alone["input_ids"].shape[1]
    longer = make_example("The red patch. " * 20, images=())
    for side in ("right", "left"):
        batch = make_collator(family, side=side)([longer, _rich()])
        width = batch["input_ids"].shape[1]
        assert width > length
        shift = width - length if side == "left" else 0
        window = slice(shift, shift + length)
        assert batch["attention_mask"][1].sum().item() == length
        assert batch["attention_mask"][1, window].all()
        for key in ("input_ids", "labels", "gk_image"):
            assert batch[key][1, window].tolist() == alone[key][0].tolist(), key
        for key in ("text", "side", "word", "map", "map_token"):
            key = f"gk_{key}_position"
            assert [p - shift for p in live(batch[key][1])] == live(alone[key][0]), key
        assert [p - shift for p in live(batch["gk_map_columns"][1])] == live(
            alone["gk_map_columns"][0]
        )
        assert batch["gk_side_inside"][1, :, window].tolist() == alone["gk_side_inside"][0].tolist()
        for key in ("gk_side_set", "gk_word_label", "gk_map_image"):
            assert live(batch[key][1]) == live(alone[key][0]), key
        assert batch["gk_map_target"][1].tolist() == alone["gk_map_target"][0].tolist()
        for key in ("gk_side_position", "gk_word_label", "gk_map_position", "gk_map_columns"):
            assert live(batch[key][0]) == [], key
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


GK = {f"gk_{name}": spec.dtype for name, spec in FIELDS.items()}


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_every_gk_tensor_is_always_there(family):
    text_only = make_collator(family)([make_example(images=()), make_example(images=())])
    full = make_collator(family)([_rich(), _rich(), make_example(images=())])
    for batch in (text_only, full):
        assert {k: v.dtype for k, v in batch.items() if k.startswith("gk_")} == GK
        size = len(batch["input_ids"])
        assert all(len(v) == size for k, v in batch.items() if k.startswith("gk_"))
    assert "pixel_values" not in text_only
    shapes = {k: tuple(text_only[k].shape[1:]) for k in GK}
    tokens = text_only["input_ids"].shape[1]
    assert shapes["gk_side_inside"] == (0, tokens)
    assert shapes["gk_word_bag"] == shapes["gk_map_target"] == (0, 0)
    assert shapes["gk_map_columns"] == shapes["gk_word_position"] == (0,)
    assert shapes["gk_phrase_composite"] == (0, 3)
    assert shapes["gk_text_position"][0] > 0
    assert full["gk_map_target"].shape == (3, 1, full["gk_map_columns"].shape[1])


def test_a_conversation_without_an_answer_has_no_rows():
    example = GroundedExample((), [{"role": "user", "content": "Where?"}])
    batch = make_collator()([example])
    assert batch["gk_text_position"].shape == (1, 0)
    assert (batch["labels"] == -100).all()


def test_truncation_cuts_text_from_the_end_and_counts_what_is_lost():
    whole = make_collator()([_rich()])
    length = whole["input_ids"].shape[1]
    collator = make_collator(max_length=length - 6)
    batch = collator([_rich()])
    assert batch["input_ids"][0].tolist() == whole["input_ids"][0, :-6].tolist()
    assert batch["labels"][0].tolist() == whole["labels"][0, :-6].tolist()
    assert batch["pixel_values"].equal(whole["pixel_values"])
    counts = collator.counts
    assert counts["tokens_truncated"] == 6
    assert counts["samples_truncated"] == counts["map_rows_truncated"] == 1
    assert batch["gk_map_position"].shape == (1, 0)
    kept = len(live(batch["gk_side_position"][0]))
    assert 0 < kept < len(live(whole["gk_side_position"][0]))
    assert counts["regions_truncated"] == 1
    assert batch["gk_word_position"].equal(whole["gk_word_position"])
    exact = make_collator(max_length=length)
    assert exact([_rich()])["input_ids"].equal(whole["input_ids"])
    assert exact.counts["samples_truncated"] == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_late_images_and_their_wrapping(side):
    answer = "The red patch. " * 6
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "row 2"},
    ]
    example = GroundedExample(
        (IMAGE, SMALL), messages, (make_region("row 2", "2", turn=3, image=1),), name="late"
    )
    collator = make_collator(side=side, max_length=44)
    batch = collator([make_example("red"), example])
    ids = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    assert len(ids) == 44
    text = collator.processor.tokenizer.decode(ids)
    assert text.endswith("<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>")
    assert text.count("<|image_pad|>") == 26
    assert len(live(batch["gk_map_columns"][1])) == 26
    assert collator.counts["map_rows_truncated"] == collator.counts["regions_truncated"] == 1
    with pytest.raises(ValueError, match=r"`late: max_length`: expected at least 30"):
        make_collator(max_length=29)([example])


def test_images_without_a_placeholder_precede_the_first_user_message():
    parts = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    explicit = GroundedExample(
        (IMAGE,), [{"role": "user", "content": parts}, *make_example().messages[1:]]
    )
    collator = make_collator()
    assert collator([explicit])["input_ids"].equal(collator([make_example()])["input_ids"])
    example = make_example()
    collator([example])
    assert example.messages[0]["content"] == "Where?"  # the caller's messages stay as they are


def _message(index, content):
    messages = [dict(message) for message in make_example().messages]
    messages[index]["content"] = content
    return GroundedExample((IMAGE,), messages, name="data.jsonl:7")


BOX = (TOP_LEFT,)
BAD = {
    "turn": (
        make_example(regions=[Region(0, 0, 2, 0, BOX)]),
        r"regions\[0\].turn`: .*got 0 \(user\)",
    ),
    "no turn": (make_example(regions=[Region(5, 0, 2, 0, BOX)]), r"got 5 \(no message\)"),
    "span": (make_example(regions=[Region(1, 9, 20, 0, BOX)]), r"regions\[0\]`: .*got 9:20"),
    "empty span": (make_example(regions=[Region(1, 3, 3, 0, BOX)]), "got 3:3"),
    "blank span": (make_example(regions=[Region(1, 3, 4, 0, BOX)]), "got 3:4"),
    "image": (make_example(regions=[Region(1, 0, 2, 1, BOX)]), r"regions\[0\].image`: .*got 1"),
    "box": (
        make_example(regions=[Region(1, 0, 2, 0, ((0.5, 0, 1.2, 1),))]),
        r"regions\[0\]`: expected a box within the image",
    ),
    "flat box": (make_example(regions=[Region(1, 0, 2, 0, ((0.5, 0, 0.5, 1),))]), "a box within"),
    "point": (make_example(regions=[Region(1, 0, 2, 0, points=((2.0, 0.1),))]), "points within"),
    "polygon": (
        make_example(regions=[Region(1, 0, 2, 0, polygons=(((0, 0), (1, 1)),))]),
        "polygons of 3 points",
    ),
    "polyline": (
        make_example(regions=[Region(1, 0, 2, 0, polylines=(((0, 0),),))]),
        "polylines of 2 points",
    ),
    "word": (make_example(words=(Word("x", (0, 0, 1, 2), 0),)), r"words\[0\]`: expected a box"),
    "too many images": (
        GroundedExample(
            (IMAGE, IMAGE), _message(0, [{"type": "image"}]).messages, name="data.jsonl:7"
        ),
        "one image part per image, 2, got 1",
    ),
    "sound": (_message(0, [{"type": "audio"}]), r"messages\[0\]`: .*got audio"),
    "video": (_message(0, [{"type": "video"}]), "one video part per video, 0, got 1"),
    "literal placeholder": (_message(0, "<|image_pad|> Where?"), "1 times .*got 2"),
    "narrow image": (
        make_example(images=(Image.new("RGB", (900, 3)),), name="data.jsonl:8"),
        "`data.jsonl:8`: expected a sample that the processor takes, got its error: abs",
    ),
    "no messages": (GroundedExample((), [], name="data.jsonl:7"), "at least one message"),
    "no role": (GroundedExample((), [{"content": "x"}], name="data.jsonl:7"), "a role"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_examples_are_named(case):
    example, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        make_collator()([make_example(name="good"), example])
    assert str(caught.value).startswith(f"`{example.name}")


def test_bad_settings_are_named():
    processor, config = tiny_qwen_processor(), make_config("qwen")
    with pytest.raises(ValueError, match="`on_shared_token`: expected 'drop'"):
        GroundingCollator(processor, config, on_shared_token="first")
    with pytest.raises(ValueError, match="`max_length`"):
        GroundingCollator(processor, config, max_length=0)
    with pytest.raises(ValueError, match="vocabulary of 300"):
        GroundingCollator(processor, make_config("qwen", 300))([make_example()])
    with pytest.raises(ValueError, match="`examples`: expected at least one"):
        make_collator()([])
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"`processor.tokenizer`: expected a pad token"):
        GroundingCollator(processor, config)


def test_a_real_config_has_what_the_collator_reads():
    token = tiny_llava_processor().tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(image_token_id=token)
    batch = GroundingCollator(tiny_llava_processor(), config)([_rich()])
    assert len(live(batch["gk_map_columns"][0])) == 16


def test_counts_add_up_over_batches():
    collator = make_collator()
    assert collator.counts == Counter()
    for _ in range(2):
        collator([_rich(), make_example(images=())])
    assert collator.counts["samples"] == 4
    assert collator.counts["regions"] == 4
    assert collator.counts["words"] == collator.counts["word_rows"] == 2
    assert collator.counts["map_rows"] == 2


def test_truncation_keeps_what_stands_between_tiles():
    """Row and column tokens, line breaks and the frame of an image go with its visual tokens."""
    family = FAMILIES["idefics3"]
    config = family.model().config
    example = make_example("A very long answer, with many words that nobody will ever read.")
    whole = GroundingCollator(family.processor(), config)([example])
    ids = whole["input_ids"][0]
    at = (ids == config.image_token_id).nonzero()[:, 0]
    frame = ids[int(at[0]) - 2 : int(at[-1]) + 2].tolist()
    cut = GroundingCollator(family.processor(), config, max_length=len(ids) - 9)([example])
    kept = cut["input_ids"][0]
    assert len(kept) == len(ids) - 9
    first = int((kept == config.image_token_id).nonzero()[0]) - 2
    assert kept[first : first + len(frame)].tolist() == frame
    assert len(set(frame)) > 6  # tiles of two rows and two columns, line breaks, a global view


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_images_in_bfloat16_get_the_dtype_of_the_model(monkeypatch, dtype):
    """Llama 4's processor makes them so, and a model in fp32 does not take them."""
    processor, config = tiny_qwen_processor(), make_config("qwen")
    config.dtype = dtype
    plain = sequences.call

    def call(*args, **options):
        features = plain(*args, **options)
        return {**features, "pixel_values": features["pixel_values"].bfloat16()}

    monkeypatch.setattr(sequences, "call", call)
    batch = GroundingCollator(processor, config)([_rich()])
    assert batch["pixel_values"].dtype == (dtype or torch.float32)
