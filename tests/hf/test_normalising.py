"""Item 15: under tokenizers that normalise, a phrase has all its tokens and none of its neighbours.

Every tokenizer is made here: one token per character after normalisation, and a few longer ones.
"""

from __future__ import annotations

import random
import unicodedata
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.families.zoo.first import tiny_llava_processor
from groundkern.hf import GroundingCollator, Phrase
from groundkern.hf.data.regions import MAP_ROWS
from groundkern.hf.data.spans import TokenSpans
from tests.hf.charsmap import charsmap
from tests.hf.collating import live, make_collator, make_config, make_example, make_region

RULES = {"…": "...", "ﬁ": "fi", "Ａ": "A", "e\u0301": "é", "½": "1⁄2", "㍿": "株式会社"}
RULES |= {"\u3000": " ", "\u00a0": " ", "ｶﾞ": "ガ", "\u200b": " ", "\x01": ""}
LETTERS = sorted(
    set(map(chr, range(32, 127))) | set("▁éßäöï…⁄株式会社ガカﾞ゙ｶ你好ﬁⅨ\n\u0301\u0323ộ½\u200b")
)
PRECOMPILED = normalizers.Precompiled(charsmap(RULES))
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA = normalizers.Replace(" ", "▁")
NORMALIZERS = {
    "precompiled": normalizers.Sequence([PRECOMPILED, normalizers.Replace(Regex(" {2,}"), " ")]),
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "llama": LLAMA,
    "gemma": GEMMA,
    "t5": normalizers.Sequence([PRECOMPILED, LLAMA]),
    "lower": normalizers.Lowercase(),
    "strip": normalizers.Strip(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "ellipsis": normalizers.Replace("...", "…"),
    "umlaut": normalizers.Replace("ae", "ä"),
    "bert": normalizers.BertNormalizer(),
    "metaspace": None,
    "dropping": None,
}
MERGES = [("▁", "r"), ("▁r", "e"), ("▁re", "d"), (".", "."), ("..", "."), ("f", "i")]


def tokenizer(kind, merges=MERGES):
    vocabulary = {token: index for index, token in enumerate(["<unk>", *LETTERS])}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    unknown = {} if kind == "dropping" else {"unk_token": "<unk>"}
    made = Tokenizer(models.BPE(vocabulary, merges, **unknown))
    if NORMALIZERS[kind] is not None:
        made.normalizer = NORMALIZERS[kind]
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return made


def collator(kind, template_end="</s>", **options):
    processor = tiny_llava_processor()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(kind),
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    template = processor.chat_template.replace("<|endoftext|>", template_end)
    # a special token right before the answer, as in many templates: Llama prefixes a space there
    processor.chat_template = template.replace("{{ part['text'] + ' ' }}", "</s>{{ part['text'] }}")
    config = SimpleNamespace(**vars(make_config("llava", 1000)))
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.image_token_id = config.image_token_id
    return GroundingCollator(processor, config, **options)


def tokens_of(made, answer, phrase):
    """The tokens that the phrase's rows predict, by SMAM and by HIST."""
    region = make_region(answer, phrase)
    batch = made([make_example(answer, [region], phrases=(Phrase(1, region.start, region.stop),))])
    side = [p + 1 for p in live(batch["gk_side_position"][0])]
    assert side == [p + 1 for p in live(batch["gk_phrase_position"][0])]
    ids = batch["input_ids"][0][side].tolist()
    return made.processor.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("kind", "answer", "phrase", "tokens"),
    [
        ("precompiled", "wait… and", "wait…", "w a i t ..."),
        ("precompiled", "wait… and", "…", "..."),
        ("precompiled", "wait… and", "and", "a n d"),
        ("precompiled", "a ﬁne day", "ﬁne", "fi n e"),
        ("precompiled", "a ﬁne day", "a", "a"),
        ("precompiled", "x㍿y z", "㍿", "株 式 会 社"),
        ("precompiled", "x㍿y z", "y", "y"),
        ("precompiled", "cafe\u0301 x", "cafe\u0301", "c a f é"),
        ("precompiled", "a  \u3000b c", "b", "b"),
        ("nfkc", "ｶﾞx y", "ｶﾞ", "ガ"),
        ("nfkc", "ｶﾞx y", "x", "x"),
        ("nfkc", "Ａ½b", "½", "1 ⁄ 2"),
        ("nfkc", "Ａ½b", "Ａ", "A"),
        ("nfc", "cafe\u0301 x", "cafe\u0301", "c a f é"),
        ("nfc", "o\u0302\u0323x", "o\u0302\u0323", "ộ"),
        ("nfc", "o\u0302\u0323x", "x", "x"),
        ("nfd", "é x", "é", "e \u0301"),
        ("accents", "é x", "é", "e"),
        ("lower", "The RED one", "RED", "r e d"),
        ("bert", "Café 你好 x", "你", "你"),
        ("bert", "Café 你好 x", "你好 x", "你 ▁ ▁ 好 ▁ ▁ x"),
        ("llama", "red x", "red", "▁red"),
        ("llama", "x red", "x", "x"),  # not the ▁ that the tokenizer puts in front
        ("llama", "x red", "red", "▁red"),
        ("llama", "é red", "é", "é"),
        ("t5", "x… red", "x…", "x ..."),
        ("metaspace", "x red", "x", "x"),
        ("metaspace", "x red", "red", "▁red"),
        ("gemma", "x red", "x", "x"),
        ("gemma", "x red", "red", "▁red"),
        ("strip", "red x", "x", "x"),
        ("ellipsis", "wait... and", "...", "…"),
        ("ellipsis", "wait... and", "wait...", "w a i t …"),
        ("ellipsis", "wait... and", "and", "a n d"),
        ("umlaut", "caesar", "aesar", "ä s a r"),
    ],
)
def test_a_phrase_has_exactly_its_tokens(kind, answer, phrase, tokens):
    found = tokens_of(collator(kind), answer, phrase)
    assert found == [" " if token == "▁" and kind == "bert" else token for token in tokens.split()]


@pytest.mark.parametrize(
    ("kind", "answer", "phrase", "message"),
    [
        ("ellipsis", "wait... and", "t.", "'t.', whose '.' has none"),
        ("ellipsis", "wait... and", ".", "'.', of which the tokenizer keeps nothing"),
        ("umlaut", "caesar", "ca", "'ca', whose 'a' has none"),
        ("nfc", "cafe\u0301 x", "\u0301 x", "which begins within a character"),
        ("nfkc", "ｶﾞx y", "ﾞx", "'ﾞx', which begins within a character"),
    ],
)
def test_a_phrase_that_shares_a_token_out_of_its_offsets_is_refused(kind, answer, phrase, message):
    """A token of several characters has the offsets of one: nothing tells whose the token is."""
    with pytest.raises(ValueError) as caught:
        tokens_of(collator(kind), answer, phrase)
    assert str(caught.value).startswith("`data.jsonl:7: regions[0]`: expected text with tokens of")
    assert message in str(caught.value)
    example = make_example(answer, phrases=(Phrase(1, answer.index(phrase), len(answer)),))
    if "begins" in message:
        with pytest.raises(ValueError, match=r"phrases\[0\]`"):
            collator(kind)([example])


def test_text_that_a_tokenizer_leaves_out_is_refused():
    """A BPE without an unknown token and bytes: behind what it drops, offsets are those before."""
    made = collator("dropping")
    broken = made.processor.tokenizer.backend_tokenizer.encode("\u2603 red")
    assert broken.offsets[0] == (0, 1)  # of the space; if this fails, the refusal is needed no more
    assert tokens_of(made, "the red \n x", "red") == ["r", "e", "d"]
    for role in (0, 1):
        example = make_example()
        example.messages[role]["content"] = "x\u2603 red"
        with pytest.raises(ValueError, match=rf"messages\[{role}\]`.*got U\+2603 SNOWMAN"):
            made([example])
        collator("gemma")([example])  # has <unk>


def test_a_character_whose_removal_shifts_the_offsets_is_refused():
    """tokenizers 0.23: behind a removed character, `Precompiled`'s offsets point beside it."""
    broken = tokenizer("precompiled").encode("\x01red")
    assert broken.offsets[0] != (1, 2)  # if this fails, the refusal is needed no more
    for role, message in ((0, "messages[0]"), (1, "messages[1]")):
        example = make_example()
        example.messages[role]["content"] = "the \x01red"
        with pytest.raises(ValueError, match="U\\+0001") as caught:
            collator("precompiled")([example])
        assert message in str(caught.value)
        collator("nfkc")([example])
    assert tokens_of(collator("precompiled"), "a\u200bred x", "red") == ["r", "e", "d"]


def test_the_last_token_of_an_answer_that_ends_in_a_combining_mark():
    """Qwen's NFC: the mark has no offsets of its own, and KLAL's row is that of the whole."""
    answer = "The cafe\u0301"
    for rows in set(MAP_ROWS) - {"anchor"}:  # which is a token of its own
        made = collator("nfc", map_rows=rows)
        batch = made([make_example(answer, [make_region(answer, "cafe\u0301")])])
        positions = live(batch["gk_map_position"][0])
        ids = batch["input_ids"][0][positions].tolist()
        found = made.processor.tokenizer.convert_ids_to_tokens(ids)
        whole = [*"The caf", "é"]
        wanted = {"last": whole[-1:], "predictor": whole[-2:-1], "phrase": whole[-4:]}
        wanted |= {"phrase_predictor": whole[-5:-1], "answer": whole}
        if rows == "answer_predictor":  # its first row is the chat template's
            assert found[1:] == whole[:-1]
        else:
            assert found == wanted[rows]


def _composed(form):
    def segments(text):
        start = 0
        while start < len(text):
            stop = start + 1
            while stop < len(text) and _normalise(form, text[start : stop + 1]) != _normalise(
                form, text[start:stop]
            ) + _normalise(form, text[stop]):
                stop += 1
            yield start, stop, _normalise(form, text[start:stop])
            start = stop

    return segments


def _normalise(form, text):
    return unicodedata.normalize(form.upper(), text)


def _replaced(rules):
    def segments(text):
        start = 0
        while start < len(text):
            lengths = (n for n in (3, 2, 1) if text[start : start + n] in rules)
            stop = min(len(text), start + next(lengths, 1))
            yield start, stop, rules.get(text[start:stop], text[start:stop])
            start = stop

    return segments


SEGMENTS = {
    **{form: _composed(form) for form in ("nfc", "nfd", "nfkc", "nfkd")},
    "precompiled": _replaced({k: v for k, v in RULES.items() if v != ""}),
    "gemma": _replaced({" ": "▁"}),
    "ellipsis": _replaced({"...": "…"}),
    "umlaut": _replaced({"ae": "ä"}),
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_any_stretch_of_whole_characters_has_exactly_its_tokens(kind):
    """Against a normaliser of its own, written here, on random texts of tricky characters."""
    made, rng = tokenizer(kind, merges=[]), random.Random(0)
    parts = [*"ab .x…ﬁＡé½㍿ｶガ", "ｶﾞ", "e\u0301", "...", "ae"]
    tried = 0
    for _ in range(400):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 9)))
        segments = list(SEGMENTS[kind](text))
        if "".join(new for _, _, new in segments) != made.normalizer.normalize_str(text):
            continue  # graphemes and repeated spaces, which the rules above know nothing of
        encoded = made.encode(text)
        source = [index for index, (_, _, new) in enumerate(segments) for _ in new]
        assert len(encoded.ids) == len(source)
        spans = TokenSpans(
            encoded.offsets, [], lambda token, e=encoded: not e.tokens[token].strip()
        )
        for first in range(len(segments)):
            for last in range(first, len(segments)):
                start, stop = segments[first][0], segments[last][1]
                if text[start].isspace() or text[stop - 1].isspace():
                    continue
                wanted = [t for t, index in enumerate(source) if first <= index <= last]
                assert list(spans.words(start, stop).tokens) == wanted, (text, text[start:stop])
                tried += 1
    assert tried > 3000


def test_byte_level_tokens_of_a_character_are_all_its_own():
    """And the tiny Qwen's, whose characters are two to four tokens."""
    made = make_collator()
    answer = "图中有你好 x 🙂🙂"
    for phrase, pieces in (("你", 3), ("🙂🙂", 8), ("有你", 6)):
        assert len(tokens_of(made, answer, phrase)) == pieces
