"""What the tests of the collator share: small pictures, examples and collators."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from PIL import Image
from tokenizers import pre_tokenizers

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Region

IMAGE = Image.new("RGB", (140, 112), "white")  # Qwen: 4 rows of 5 tokens
SMALL = Image.new("RGB", (56, 84), "white")  # Qwen: 3 rows of 2 tokens
TOP_LEFT = (0.0, 0.0, 0.2, 0.25)
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)
PROCESSORS = {"qwen": tiny_qwen_processor, "llava": tiny_llava_processor}


@cache
def _image_token(family):
    token = tiny_qwen_processor().tokenizer.convert_tokens_to_ids
    return token({"qwen": "<|image_pad|>", "llava": "<image>"}[family])


def make_config(family, vocabulary=512):
    """A new one, which a test may change."""
    return SimpleNamespace(
        model_type={"qwen": "qwen2_5_vl", "llava": "llava"}[family],
        image_token_id=_image_token(family),
        get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary),
    )


def make_collator(family="qwen", *, side="right", **options):
    return GroundingCollator(PROCESSORS[family](padding_side=side), make_config(family), **options)


def make_example(
    answer="The red patch.", regions=(), *, images=(IMAGE,), name="data.jsonl:7", **more
):
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    return GroundedExample(tuple(images), messages, tuple(regions), name=name, **more)


def make_dialogue(*answers):
    """One image and one answer to each turn."""
    messages = []
    for answer in answers:
        messages.append({"role": "user", "content": [{"type": "image"}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def make_region(answer, phrase, *, occurrence=0, turn=1, image=0, boxes=(TOP_LEFT,), **more):
    start = -1
    for _ in range(occurrence + 1):
        start = answer.index(phrase, start + 1)
    return Region(turn, start, start + len(phrase), image, boxes=boxes, **more)


def live(row):
    return row[row >= 0].tolist()


def token_bytes(collator, batch, b, positions):
    """The bytes of tokens, each on its own."""
    alphabet = {char: byte for byte, char in _byte_alphabet().items()}
    ids = batch["input_ids"][b][torch.as_tensor(positions)].tolist()
    tokens = collator.processor.tokenizer.convert_ids_to_tokens(ids)
    return [bytes(alphabet[char] for char in token) for token in tokens]


@cache
def _byte_alphabet():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {}
    for code in range(0x800):
        text = chr(code)
        pieces = byte_level.pre_tokenize_str(text)[0][0]
        found.update(zip(text.encode(), pieces))
    for byte in range(256):  # bytes that lead longer sequences
        found.setdefault(byte, chr(byte))
    return found
