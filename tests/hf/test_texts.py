"""Item 11: what text may not hold, and what counts as text, in messages, words and concepts."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, normalizers

from benchmarks.families.zoo.first import tiny_qwen_processor
from benchmarks.families.zoo.making import tiny_tokenizer
from groundkern.hf import GroundedExample, GroundingCollator, Phrase, Word
from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.texts import TextRules
from tests.hf.collating import (
    IMAGE,
    live,
    make_collator,
    make_config,
    make_example,
    make_region,
)
from tests.hf.families import FAMILIES


def _example(role, text, *, before="", behind=""):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "The red patch."},
    ]
    index = [message["role"] for message in messages].index(role)
    messages[index]["content"] = before + text + behind
    return GroundedExample((IMAGE,), messages, name="data.jsonl:7"), index


@pytest.fixture(params=FAMILIES)
def family(request):
    made = FAMILIES[request.param]
    processor = made.processor()
    return GroundingCollator(processor, made.model().config, lens=True, max_label_tokens=99)


def _special(processor):
    tokens = processor.tokenizer.added_tokens_decoder.values()
    return {str(token) for token in tokens if token.special} | {processor.image_token}


def test_every_special_token_of_every_family_is_refused_by_name_in_messages(family):
    tokens = _special(family.processor)
    assert len(tokens) >= 8
    family([_example("user", "red")[0]])
    for token in tokens:
        for role in ("system", "user", "assistant"):
            example, index = _example(role, token, before="yes", behind="no")
            with pytest.raises(ValueError) as caught:
                family([_example("user", "red")[0], example])
            message = str(caught.value)
            assert message.startswith("`data.jsonl:7: messages")
            assert repr(token) in message
            if token != family.processor.image_token:  # of which there are too many
                assert message.startswith(f"`data.jsonl:7: messages[{index}]`: expected text wit")


def test_words_and_concepts_that_spell_a_special_token_are_text_in_every_family(family):
    tokens = sorted(_special(family.processor))
    tokenizer = family.processor.tokenizer
    ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    for token in tokens:
        word = Word(token, (0.3, 0.3, 0.5, 0.5), 0)
        batch = family([make_example(words=(word,))])
        (label,) = live(batch["gk_word_label"][0])
        assert label not in ids
        assert token.strip("<|[]>/").startswith(tokenizer.decode([label]).strip())
        assert family._encoder.encode(token).labels[0].token == label  # of a concept too
        bare = WordEncoder(tokenizer, strip_punctuation=False).encode(token)
        assert bare.labels[0].token not in ids
        assert token.startswith(tokenizer.decode(bare.ids[:1]).strip())


def test_an_end_of_turn_in_an_answer_is_never_trained():
    """The case of the issue: it would have been learnt as an early end."""
    example, _ = _example("assistant", "yes<|im_end|>no")
    with pytest.raises(ValueError, match=r"messages\[2\]`: .*got '<\|im_end\|>'"):
        make_collator()([example])


@pytest.mark.parametrize("parts", [("yes <|im_", "end|> no"), ("<|im_end|>", "x")])
def test_a_special_token_in_pieces_of_one_text_is_refused(parts):
    content = [{"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    with pytest.raises(ValueError, match="special tokens"):
        make_collator()([GroundedExample((IMAGE,), messages)])


def test_other_fields_of_a_message_that_templates_write_are_looked_at_too():
    example = make_example(name="x")
    example.messages[1]["reasoning_content"] = "so <|im_end|>"
    with pytest.raises(ValueError, match=r"x: messages\[1\]"):
        make_collator()([example])


def _qwen_with(*added, **settings):
    processor = tiny_qwen_processor()
    processor.tokenizer.add_tokens([AddedToken(token, **settings) for token in added])
    size = len(processor.tokenizer)
    return GroundingCollator(processor, make_config("qwen", size), max_label_tokens=9)


def test_added_tokens_that_are_not_special_are_text():
    """Gemma's runs of white space and HTML tags, Qwen's tool calls: models write them."""
    added = ("\n\n\n", "    ", "<table>", "<tool_call>", "<think>")
    collator = _qwen_with(*added, normalized=False)
    answer = "<think>red</think>\n\n\n    <table>1<tool_call>"
    batch = collator([_example("assistant", answer)[0], _example("user", answer)[0]])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert collator.processor.tokenizer.decode(trained) == answer + "<|im_end|>"
    ids = set(collator.processor.tokenizer.convert_tokens_to_ids(added))
    assert ids <= set(trained.tolist())


def test_tokens_that_the_template_writes_around_messages_are_special_without_the_flag():
    """A tokenizer whose end of turn was only added: it is refused in texts, and trained."""
    collator = _qwen_with("<|turn|>", "<|stop|>", "red", normalized=False)
    processor = collator.processor
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "<|stop|>")
    processor.chat_template = processor.chat_template.replace("<|im_start|>", "<|turn|>")
    batch = collator([make_example()])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert processor.tokenizer.decode(trained) == "The red patch.<|stop|>"
    for token in ("<|stop|>", "<|turn|>"):
        with pytest.raises(ValueError, match="special tokens"):
            collator([make_example(token)])
        label = WordEncoder(
            processor.tokenizer, strip_punctuation=False, rules=collator._reader.rules
        )
        # the tokenizer cannot be told to read it as text
        assert label.encode(token).unusable == "special"
        assert collator._encoder.encode(token).unusable is None  # without its brackets it is text


def test_a_placeholder_of_another_family_is_text_where_nothing_reads_it():
    collator = make_collator()
    assert "<IMG_CONTEXT>" not in collator.processor.tokenizer.get_vocab()
    batch = collator([_example("assistant", "an <IMG_CONTEXT> here")[0]])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert "<IMG_CONTEXT>" in collator.processor.tokenizer.decode(trained)


def test_a_video_placeholder_that_the_processor_reads_is_refused():
    made = FAMILIES["llava_onevision"]
    collator = GroundingCollator(made.processor(), made.model().config)
    assert "<video>" not in collator.processor.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"messages\[1\]`: .*got '<video>'"):
        collator([_example("user", "<video> Where?")[0]])


def test_a_template_that_makes_image_slots_of_text_is_refused():
    collator = make_collator()
    collator.processor.chat_template = collator.processor.chat_template.replace(
        "{{ part['text'] }}", "{{ part['text'] | replace('[img]', '<|image_pad|>') }}"
    )
    collator([_example("user", "Where?")[0]])
    with pytest.raises(ValueError, match=r"data\.jsonl:7: messages`: expected 1 times"):
        collator([_example("user", "[img] Where?")[0]])


def test_a_special_token_by_another_form_of_its_characters_is_refused():
    """An added token that is looked for in normalised text: full-width letters spell it too."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<stop>", normalized=True, special=True)})
    rules = TextRules(tokenizer)
    text = "\uff1cstop\uff1e"  # full-width signs
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    assert rules.special(f"a {text} b") == "<stop>"
    assert rules.special("a <|im_\uff45nd|> b") is None  # looked for as it is written
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokenizer("<|im_\uff45nd|>").input_ids
    )


def test_padding_by_an_ordinary_sign_leaves_that_sign_to_texts():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    rules = TextRules(tokenizer)
    assert rules.special("Stop!") is None
    assert rules.special("<|im_end|>!") == "<|im_end|>"


def test_tokens_may_be_allowed_in_messages():
    """Such as those around boxes in Qwen2-VL's answers."""
    options = {"allowed_tokens": ["<|vision_start|>"]}
    batch = make_collator(**options)([_example("assistant", "a <|vision_start|> b")[0]])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    decoded = tiny_tokenizer().decode(trained)
    assert decoded == "a <|vision_start|> b<|im_end|>"
    with pytest.raises(ValueError, match=r"got '<\|im_end\|>'"):
        make_collator(**options)([_example("assistant", "a <|im_end|> b")[0]])
    for token in ("<|image_pad|>", "red"):
        with pytest.raises(ValueError, match="allowed_tokens"):
            make_collator(allowed_tokens=[token])([make_example()])


@pytest.mark.parametrize("character", [0, 0xD800, 0xDFFF, 0xFDD0, 0xFDD1])
@pytest.mark.parametrize("checked", [False, True])
def test_text_that_nothing_can_follow_is_refused_by_its_code_point(character, checked):
    code, character = f"U\\+{character:04X}", chr(character)
    messages = _example("user", f"Where{character}?")[0].messages
    example = GroundedExample((IMAGE,), messages, name="x", checked=checked)
    with pytest.raises(ValueError, match=rf"`x: messages\[1\]`: expected text without .*{code}"):
        make_collator()([example])
    with pytest.raises(ValueError, match=rf"`x: messages\[1\]`: .*{code}"):
        make_collator()([make_example(f"red{character}", name="x")])


def test_half_a_surrogate_pair_in_a_word_and_parts_without_text_are_named():
    word = Word("a\ud800", (0, 0, 0.1, 0.1), 0)
    with pytest.raises(ValueError, match=r"`x: words\[0\].text`: expected Unicode text"):
        make_collator()([make_example(words=(word,), name="x")])
    messages = [{"role": "assistant", "content": [{"type": "text", "text": None}]}]
    with pytest.raises(ValueError, match=r"`x: messages\[0\]`: .*got NoneType"):
        make_collator()([GroundedExample((), messages, name="x")])


def test_a_word_of_characters_that_nobody_sees_is_blank():
    words = tuple(
        Word(text, (x, 0, x + 0.1, 0.1), 0)
        for text, x in (("\u200b", 0), ("\ufeff\0", 0.3), ("\u200bred\ufeff", 0.6))
    )
    collator = make_collator()
    batch = collator([make_example(words=words)])
    assert collator.counts["words_dropped_blank"] == 2
    labels = live(batch["gk_word_label"][0])
    assert tiny_tokenizer().convert_ids_to_tokens(labels) == ["Ġred"]


def test_clean_texts_are_what_they_were_whatever_they_look_like():
    """Signs of special tokens by themselves are no special token."""
    answer = "a < b | c > d <|x|> [INST] <s> </s> <image </image> im_end"
    phrase = Phrase(1, 0, 5)
    collator = make_collator()
    batch = collator([make_example(answer, [make_region(answer, "c >")], phrases=(phrase,))])
    trained = batch["labels"][0][batch["labels"][0] >= 0]
    assert tiny_tokenizer().decode(trained) == answer + "<|im_end|>"
    assert torch.is_tensor(batch["gk_phrase_position"])
