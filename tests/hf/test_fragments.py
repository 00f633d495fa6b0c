"""Item 16: a word or concept whose first token is a part of a character is dropped and counted."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.families.zoo.making import tiny_tokenizer
from groundkern.hf import Word
from groundkern.hf.data.labels import WordEncoder
from tests.hf.collating import live, make_collator, make_example, make_region

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # an emoji of five code points
RARE = "\U00020bb7"  # 𠮷
FRAGMENTS = ["你", RARE, "你好 red", "é\u0301"]
EMOJI = ["🙂", FAMILY]


def byte_level(*characters):
    """A byte-level BPE that knows some characters as one token, with and without a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for text in characters:
        ((token, _),) = level.pre_tokenize_str(text)
        left = token[0]
        for right in token[1:]:
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary[left + right] = len(vocabulary)
            left += right
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback(*known, prefix=True):
    """As Llama's and Gemma's: characters beside `known` are bytes, spaces are ▁."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *known]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def shown(tokenizer, text, **options):
    found = WordEncoder(tokenizer, **options).encode(text)
    return found.unusable or tokenizer.decode([found.labels[0].token])


@pytest.mark.parametrize("text", FRAGMENTS[:-1] + EMOJI)
def test_a_fragment_of_a_byte_level_tokenizer_is_dropped_and_counted(text):
    options = {"max_label_tokens": 99, "strip_punctuation": text not in EMOJI}
    collator = make_collator(**options)
    word = Word(text, (0, 0, 0.1, 0.1), 0)
    batch = collator([make_example(words=(word, Word("red", (0.5, 0.5, 0.6, 0.6), 0)))])
    assert collator.counts["words_dropped_fragment"] == 1
    assert collator.counts["words_dropped_long"] == 0
    labels = live(batch["gk_word_label"][0])
    assert tiny_tokenizer().convert_ids_to_tokens(labels) == ["Ġred"]
    keeping = make_collator(**options, byte_fragments="keep")
    kept = live(keeping([make_example(words=(word,))])["gk_word_label"][0])
    assert tiny_tokenizer().decode(kept) == "\ufffd"
    assert keeping.counts["words_dropped_fragment"] == 0
    assert keeping.counts["words_useless_fragment"] == 1


@pytest.mark.parametrize("text", EMOJI)
def test_an_emoji_goes_with_the_punctuation(text):
    collator = make_collator()
    collator([make_example(words=(Word(text, (0, 0, 0.1, 0.1), 0),))])
    assert collator.counts["words_dropped_punctuation"] == 1


@pytest.mark.parametrize("prefix", [True, False])
def test_a_fragment_of_sentencepiece_is_dropped(prefix):
    tokenizer = byte_fallback(*"abcdé你", prefix=prefix)
    assert shown(tokenizer, "你a") == "你"  # not the blank in front, Llama's own
    assert shown(tokenizer, "éa") == "é"
    for text in (RARE, "好", FAMILY, "🙂a"):
        options = {"strip_punctuation": False}
        assert shown(tokenizer, text, **options) == "fragment", text
        assert shown(tokenizer, text, **options, byte_fragments="keep") == "\ufffd"
    assert shown(tokenizer, "🙂a") == "a"
    assert shown(tokenizer, "x") == "x"  # a byte that is a whole character
    bare = byte_fallback(*"ab")
    bare.backend_tokenizer.decoder = decoders.Metaspace()  # shows <0xE5> as it is
    assert shown(bare, "好") == "fragment"


def test_a_character_that_is_whole_without_the_space_is_a_label():
    """Qwen's " 你" begins with a space and two bytes; its "你" is one token."""
    tokenizer = byte_level("你", " red")
    with_space = tokenizer(" 你", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(with_space[:1]) == " "
    glued = byte_level(" \u4f61", "你")  # " 佡" shares its first bytes with " 你"
    first = glued(" 你", add_special_tokens=False)["input_ids"][:1]
    assert glued.decode(first) == " \ufffd"
    for each in (tokenizer, glued):
        assert shown(each, "你") == "你"
        assert shown(each, "你", leading_space=False) == "你"
    assert shown(tokenizer, "red") == " red"


def test_a_whole_character_before_a_fragment_is_no_fragment():
    """The first token of an emoji sequence may be an emoji by itself."""
    tokenizer = byte_level("\U0001f468", "a\u00e9")
    assert shown(tokenizer, FAMILY, strip_punctuation=False) == "\U0001f468"
    mixed = byte_level("a\u4f60")
    assert shown(mixed, "a\u4f61") == "a\ufffd"  # "a" and the first bytes of 佡: told apart by "a"
    unread = "\ufffd"  # what OCR could not read
    assert shown(tokenizer, unread, strip_punctuation=False) == "fragment"
    assert shown(tokenizer, unread) == "punctuation"


def test_a_concept_that_is_a_fragment_is_dropped_and_counted():
    answer = "red 你 and row"
    regions = [make_region(answer, text) for text in ("red", "你", "row")]
    collator = make_collator(lens=True)
    batch = collator([make_example(answer, regions)])
    assert collator.counts["lens_dropped_fragment"] == 1
    assert len(set(live(batch["gk_lens_label"][0]))) == 2
    keeping = make_collator(lens=True, byte_fragments="keep")
    assert len(set(live(keeping([make_example(answer, regions)])["gk_lens_label"][0]))) == 3
    assert keeping.counts["lens_dropped_fragment"] == 0


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="`byte_fragments`: expected 'drop' or 'keep'"):
        make_collator(byte_fragments="maybe")
