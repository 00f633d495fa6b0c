"""Spans of answers as tokens: those of a phrase cover it, those around it have no part in it."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from benchmarks.families.zoo.first import tiny_llava_processor
from benchmarks.families.zoo.making import CORPUS
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Phrase, Region, message_text
from tests.fuzz.target import Target, expect, sentence
from tests.hf.collating import PROCESSORS, live, make_config, token_bytes

PICTURE = Image.new("RGB", (28, 28), "white")
NAME = "train.jsonl:7"


def _pieces_tokenizer(normalise: bool) -> PreTrainedTokenizerFast:
    """Metaspace BPE with byte fallback and <s>, as Llama's; with NFKC, as T5's and Gemma's were."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if normalise:
        model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", "<image>", *every_byte],
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


@cache
def _collators() -> dict[str, GroundingCollator]:
    found = {
        name: GroundingCollator(make(), make_config(name)) for name, make in PROCESSORS.items()
    }
    for name in ("pieces", "nfkc"):
        processor = tiny_llava_processor()
        processor.tokenizer = _pieces_tokenizer(name == "nfkc")
        template = processor.chat_template.replace("<|endoftext|>", "</s>")
        processor.chat_template = "{{ bos_token }}" + template
        config = SimpleNamespace(**vars(make_config("llava", 1000)))
        config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        processor.image_token_id = config.image_token_id
        found[name] = GroundingCollator(processor, config)
    return found


def check_spans(data: bytes) -> bool:
    """A chat with one region; its side rows are the phrase's tokens, its labels the answers'."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    example = _example(found.get("messages"), found.get("span"))
    family = found.get("family")
    collator = _collators().get(family if isinstance(family, str) else "qwen")
    if example is None or collator is None:
        return False
    try:
        batch = collator([example])
    except ValueError as error:
        sentence(str(error))
        expect(NAME in str(error), "the sample's name in the error", error)
        return False
    ids = batch["input_ids"][0].tolist()
    side = [p + 1 for p in live(batch["gk_side_position"][0])]
    trained = [p for p, label in enumerate(batch["labels"][0].tolist()) if label >= 0]
    expect(set(side) <= set(trained), "side rows among the trained", side, trained)
    region = example.regions[0]
    texts = [message_text(m) for m in example.messages]
    phrase = texts[region.turn][region.start : region.stop].strip()
    answers = [t for t, m in zip(texts, example.messages, strict=True) if m["role"] == "assistant"]
    in_parts = isinstance(example.messages[region.turn]["content"], list)
    if family in ("pieces", "nfkc"):
        _covered(collator.processor.tokenizer, [ids[p] for p in side], phrase, in_parts)
    else:
        _exact(collator, batch, side, trained, region, answers, texts, in_parts)
    again = collator([replace(example, name=NAME)])
    expect(all((again[key] == batch[key]).all() for key in batch), "the same twice", batch)
    return True


def _covered(tokenizer: Any, ids: list[int], phrase: str, in_parts: bool) -> None:
    expect(bool(ids), "tokens of a phrase", phrase)
    decoded, wanted = _plain(tokenizer.decode(ids)), _plain(phrase)
    if in_parts:
        decoded, wanted = decoded.replace(" ", ""), wanted.replace(" ", "")
    expect(wanted in decoded, f"tokens that hold {phrase!r}", decoded)


def _plain(text: str) -> str:
    """What a normalising tokenizer may change, and the marks that it writes for spaces."""
    folded = unicodedata.normalize("NFKC", text).replace("\u2581", " ")
    return unicodedata.normalize("NFKC", " ".join(folded.split()))


def _exact(
    collator: GroundingCollator,
    batch: dict,
    side: list[int],
    trained: list[int],
    region: Region,
    answers: list[str],
    texts: list[str],
    in_parts: bool,
) -> None:
    """Byte for byte: the tokens that share a byte with the phrase, and no others."""
    special = set(collator.processor.tokenizer.all_special_ids)
    ids = batch["input_ids"][0].tolist()
    closing = [p for p in trained if ids[p] in special]
    spoken = [text for text in answers if text.strip()]
    expect(len(closing) <= len(answers), "one closing token for each answer", closing)
    body = [p for p in trained if ids[p] not in special]
    pieces = token_bytes(collator, batch, 0, body)
    text = b"".join(pieces)
    expect(_squeezed(text) == _squeezed("".join(spoken).encode()), "the answers", text)
    answer = texts[region.turn].encode()
    at = text.find(answer.strip())
    if text.count(answer.strip()) != 1:
        return  # an answer within another one: its place is not known from the bytes alone
    lead = len(answer) - len(answer.lstrip())
    first = at - lead + len(texts[region.turn][: region.start].encode())
    phrase = texts[region.turn][region.start : region.stop]
    first += len(phrase.encode()) - len(phrase.lstrip().encode())
    last = first + len(phrase.strip().encode())
    wanted, here = [], 0
    for position, piece in zip(body, pieces, strict=True):
        if here < last and here + len(piece) > first:
            wanted.append(position)
        here += len(piece)
    blank = {p for p, piece in zip(body, pieces, strict=True) if not piece.strip()}
    if in_parts:  # a template may strip the ends of parts, so that the space there is nobody's
        wanted, side = ([p for p in row if p not in blank] for row in (wanted, side))
    expect(side == wanted, f"the tokens {wanted} of {phrase!r}", side)


def _squeezed(text: bytes) -> bytes:
    return b"".join(text.split())


def _example(messages: Any, span: Any) -> GroundedExample | None:
    """An example of what is there; None: not the form that a checked sample has."""
    if not isinstance(messages, list) or not isinstance(span, list) or len(span) != 3:
        return None
    if not all(type(n) is int and 0 <= n < 1000 for n in span) or not 0 < len(messages) < 8:
        return None
    made = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    for message in messages:
        if not isinstance(message, dict) or not set(message) <= {"role", "content"}:
            return None
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            return None
        if isinstance(content, list):
            if not all(isinstance(part, str) for part in content):
                return None
            content = [{"type": "text", "text": part} for part in content]
        elif not isinstance(content, str):
            return None
        made.append({"role": role, "content": content})
    turn, start, stop = span
    region = Region(turn + 1, start, stop, 0, boxes=((0.0, 0.0, 1.0, 1.0),))
    return GroundedExample((PICTURE,), made, (region,), (), (Phrase(turn + 1, start, stop),), NAME)


def _seed(family: str, answer: Any, span: list[int], *more: dict) -> bytes:
    messages = [{"role": "assistant", "content": answer}, *more]
    return json.dumps({"family": family, "messages": messages, "span": span}).encode()


ANSWER = "The red patch, 65 % na\u00efve caf\u00e9 \u2014 \u56fe\u4e2d\u6709 "
ANSWER += "\U0001f642 e\u0301 \ufb01\u2026 row 2"
AGAIN = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "row 5"})
SEEDS = {
    f"{family} {name}": seed
    for family in ("qwen", "llava", "pieces", "nfkc")
    for name, seed in {
        "words": _seed(family, ANSWER, [0, 4, 13]),
        "accents": _seed(family, ANSWER, [0, 20, 31], *AGAIN),
        "parts": _seed(family, ["The red ", "patch is 5"], [0, 4, 13]),
        "last": _seed(family, " \n" + ANSWER, [2, 4, 5], *AGAIN),
    }.items()
}
PIECES = ("qwen", "llava", "pieces", "nfkc", " ", "\u2581", "\ufdd0", "<|im_end|>", "<s>")
TARGETS = (Target("spans", check_spans, SEEDS, "json", PIECES, 0.5, (ValueError,)),)
