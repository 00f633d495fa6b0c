"""Text spans: exact to the token, whatever the text, the template or the tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from benchmarks.families.zoo.first import tiny_llava_processor
from benchmarks.families.zoo.making import CORPUS
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Word
from tests.hf import collating
from tests.hf.collating import (
    IMAGE,
    PROCESSORS,
    live,
    make_collator,
    make_config,
    make_example,
    make_region,
)

PHRASES = {  # (phrase, occurrence) in an answer
    "The red patch is red, redder.": [("red", 0), ("red", 1), ("redder", 0)],
    'He said "1854!" (twice)...': [("1854", 0), ('"1854!"', 0)],
    "naïve café — 65 % of it": [("café", 0), ("—", 0)],
    "图中有 你好 two 你好吗": [("你好", 1)],
    "smile 🙂🙂 now": [("🙂", 1)],
    "row 2,\n\ncolumn 5": [("column 5", 0), ("2,\n\ncolumn", 0)],
    "x": [("x", 0)],
    "e\u0301galite\u0301 and more": [("galite\u0301", 0)],
}
TRICKY = [(answer, *phrase) for answer, phrases in PHRASES.items() for phrase in phrases]


@pytest.mark.parametrize(("answer", "phrase", "occurrence"), TRICKY)
@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_side_rows_are_the_tokens_that_share_a_byte_with_the_phrase(
    family, answer, phrase, occurrence
):
    collator = make_collator(family)
    region = make_region(answer, phrase, occurrence=occurrence)
    batch = collator([make_example(answer, [region])])
    trained = [p + 1 for p in live(batch["gk_text_position"][0])]
    pieces = collating.token_bytes(collator, batch, 0, trained[:-1])
    text = b"".join(pieces)
    assert text.decode().strip() == answer
    first = text.index(answer.encode()) + len(answer[: region.start].encode())
    last = first + len(phrase.encode())
    wanted, at = [], 0
    for position, piece in zip(trained, pieces):
        if at < last and at + len(piece) > first:
            wanted.append(position)
        at += len(piece)
    assert [p + 1 for p in live(batch["gk_side_position"][0])] == wanted
    assert set(live(batch["gk_side_set"][0])) == {0}


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_labels_are_the_assistant_texts_and_what_closes_their_turns(family):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where? "}]},
        {"role": "assistant", "content": "The red patch."},
        {"role": "user", "content": "The red patch."},
        {"role": "assistant", "content": [{"type": "text", "text": "row 2"}]},
    ]
    batch = make_collator(family)([GroundedExample((IMAGE,), messages)])
    labels = batch["labels"][0]
    trained = labels != -100
    assert (labels[trained] == batch["input_ids"][0][trained]).all()
    assert (trained.nonzero()[:, 0] - 1).tolist() == live(batch["gk_text_position"][0])
    decoded = PROCESSORS[family]().tokenizer.decode(labels[trained])
    assert (
        decoded
        == {
            "qwen": "The red patch.<|im_end|>row 2<|im_end|>",
            "llava": " The red patch. <|endoftext|> row 2 <|endoftext|>",
        }[family]
    )


def test_a_template_without_a_closing_token_teaches_only_the_text():
    collator = make_collator("llava")
    template = collator.processor.chat_template
    collator.processor.chat_template = template.replace("<|endoftext|>", "")
    example = make_example("row 2")
    example.messages.append({"role": "user", "content": [{"type": "text", "text": "More?"}]})
    batch = collator([example])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert collator.processor.tokenizer.decode(trained) == " row 2"


def _aligned_bytes(collator, batch):
    aligned = [p + 1 for p in live(batch["gk_side_position"][0])]
    return collating.token_bytes(collator, batch, 0, aligned)


def _collator_whose_template_says(text):
    collator = make_collator()
    template = collator.processor.chat_template
    collator.processor.chat_template = template.replace("{{ part['text'] }}", text)
    return collator


def test_templates_that_strip_texts_keep_the_spans():
    collator = _collator_whose_template_says("{{ part['text'] | trim }}")
    answer = "  \n the red patch\n"
    batch = collator([make_example(answer, [make_region(answer, "red")])])
    assert _aligned_bytes(collator, batch) == [b" red"]
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert collator.processor.tokenizer.decode(trained) == "the red patch<|im_end|>"


def test_a_template_that_rewrites_answers_is_refused():
    collator = _collator_whose_template_says("{{ part['text'] | replace('red', 'blue') }}")
    with pytest.raises(ValueError, match="a chat template that renders assistant texts"):
        collator([make_example()])


def test_spans_run_over_several_text_parts():
    parts = [{"type": "text", "text": "The red "}, {"type": "text", "text": "patch is 5"}]
    for family in PROCESSORS:
        collator = make_collator(family)
        batch = collator([make_example(parts, [make_region("The red patch is 5", "red patch")])])
        pieces = _aligned_bytes(collator, batch)
        assert [piece.strip() for piece in pieces if piece.strip()] == [b"red", b"patch"]


def _llama_like_tokenizer():
    """Metaspace BPE with byte fallback and a <s> in front, as LLaVA-1.5 has."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", "<image>", *byte_tokens],
        show_progress=False,
    )
    model.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=["<image>"],
    )


@pytest.mark.parametrize("bos_in_template", [False, True])
def test_sentencepiece_tokenizers_with_a_beginning_token(bos_in_template):
    processor = tiny_llava_processor()
    processor.tokenizer = _llama_like_tokenizer()
    template = processor.chat_template.replace("<|endoftext|>", "</s>")
    processor.chat_template = ("{{ bos_token }}" if bos_in_template else "") + template
    config = SimpleNamespace(**vars(make_config("llava", 1000)))
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.image_token_id = config.image_token_id
    collator = GroundingCollator(processor, config)
    answer = "The red café patch is in row 2"
    words = (Word("patch", (0.3, 0, 0.4, 0.1), 0),)
    batch = collator([make_example(answer, [make_region(answer, "red café patch")], words=words)])
    to_tokens = processor.tokenizer.convert_ids_to_tokens
    ids = batch["input_ids"][0].tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
    aligned = to_tokens([ids[p + 1] for p in live(batch["gk_side_position"][0])])
    assert aligned[0] == "▁red"
    assert "".join(aligned) == "▁red▁caf<0xC3><0xA9>▁patch"
    trained = to_tokens([t for t in batch["labels"][0].tolist() if t != -100])
    assert trained[0] == "▁The"
    assert trained[-1] == "</s>"
    assert to_tokens(live(batch["gk_word_label"][0])) == ["▁patch"]  # not the lone space


def test_white_space_at_the_ends_of_a_phrase_is_not_part_of_it():
    answer = "The red patch is"
    batch = make_collator()([make_example(answer, [make_region(answer, " red ")])])
    assert len(live(batch["gk_side_position"][0])) == 1
