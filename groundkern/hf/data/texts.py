"""What the text of a message may hold: nothing that the tokenizer or the processor reads as more.

A tokenizer looks for its special tokens in the finished chat, where nothing tells those of the
template from those of a text: `<|im_end|>` in an answer ends the turn. So messages with such a
token are refused, by name. Words that are printed in an image, and the concepts of the logit lens,
are tokenised alone, and there the same characters count as text.

Tokens that a tokenizer only adds (`special` false), such as Gemma's runs of white space and HTML
tags or Qwen's `<tool_call>` and `<think>`, are text in their own tokenizer's eyes: models write
them in answers. They stay, unless the chat template itself puts them around messages.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError

from groundkern.checks import fail, require
from groundkern.hf.data.example import GroundedExample, message_text

_BRACKETED = re.compile(r"\W.+\W", re.DOTALL)  # <s>, [INST], <|im_end|>
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b-\u200f\u2060-\u2064\ufeff]")
_RARE = "\U00010380"  # UGARITIC LETTER ALPA
_PROBE = "\u2603"  # a text that no template writes itself


class TextRules:
    """Finds what one tokenizer and processor read as more than text.

    Args:
        tokenizer: a fast one.
        processor: if given, its placeholders (`image_token`, `video_token`) count, and the added
            tokens that its chat template puts around messages.
        allowed: special tokens that texts of messages may hold all the same.

    Attributes:
        ids: the ids of the special tokens, flagged or by their use in the chat template.

    Raises:
        ValueError: `allowed` holds an image's placeholder or what is no special token.
    """

    def __init__(self, tokenizer: Any, processor: Any = None, allowed: Iterable[str] = ()) -> None:
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        special = {name for name, token in added.items() if token.special}
        structure = _around_messages(processor, [name for name in added if name not in special])
        placeholders = _placeholders(processor)
        self.ids = frozenset(
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or str(token) in structure
        )
        special |= {*tokenizer.all_special_tokens, *structure, *placeholders}
        # padding may be any sign ("!"), which then is text all the same
        used = {tokenizer.bos_token, tokenizer.eos_token, *structure, *placeholders}
        fillers = {tokenizer.pad_token, tokenizer.unk_token} - used
        special -= {token for token in fillers if token and not _BRACKETED.fullmatch(token)}
        wanted = "special tokens of the tokenizer, but no placeholder of an image"
        for token in allowed:
            known = token in special and token not in placeholders
            require(known, "allowed_tokens", wanted, repr(token))
        self._reserved = special - set(allowed) - {""}
        self._pattern = _any_of(self._reserved)
        backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
        self._normalizer = getattr(backend, "normalizer", None)
        self._normalised: dict[str, str] = {}
        if self._normalizer is not None:
            self._normalised = {
                self._normalizer.normalize_str(name): name
                for name in self._reserved
                if name in added and added[name].normalized
            }
        self._normalised_pattern = _any_of(self._normalised)
        # tokenizers 0.23 shifts the offsets behind a character that such a normaliser removes, or
        # that a model without an unknown token and without bytes leaves out
        state = b"" if self._normalizer is None else self._normalizer.__getstate__()
        self._removes = b'"Precompiled"' in state
        self._tokenizer = tokenizer
        self._dropped: dict[str, bool] = {}
        self._drops = self._is_dropped(_RARE)

    def special(self, text: str) -> str | None:
        """The first special token that the tokenizer or processor would find in a text.

        Args:
            text: any.

        Returns:
            The token; None if the text is nothing but text.
        """
        if self._pattern is not None and (found := self._pattern.search(text)):
            return found[0]
        if self._normalised_pattern is not None:
            text = self._normalizer.normalize_str(text)
            if found := self._normalised_pattern.search(text):
                return self._normalised[found[0]]
        return None

    def check(self, example: GroundedExample, name: str) -> None:
        """Refuse an example whose messages hold more than text.

        Args:
            example: its messages are looked at, with all fields that are a text, and its tools.
            name: what error messages call it.

        Raises:
            ValueError: a special token, or a character whose removal by the tokenizer would leave
                spans that point beside their words; the message names the message.
        """
        for index, message in enumerate(example.messages):
            others = [v for k, v in message.items() if k != "content" and isinstance(v, str)]
            for text in (message_text(message), *others):
                self._check_text(text, f"{name}: messages[{index}]")
        for index, tool in enumerate(example.tools):
            self._check_text(json.dumps(tool, ensure_ascii=False), f"{name}: tools[{index}]")

    def _check_text(self, text: str, where: str) -> None:
        if token := self.special(text):
            wanted = "text without special tokens (`allowed_tokens` lets some through)"
            fail(where, wanted, repr(token))
        if (self._removes or self._drops) and (character := self._lost(text)):
            code = f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
            wanted = "text without characters that the tokenizer leaves out"
            fail(where, wanted, code)

    def _lost(self, text: str) -> str | None:
        """A character of the text that has no token, so that offsets behind it are wrong."""
        for character in _CONTROL.findall(text) if self._removes else ():
            if not self._normalizer.normalize_str(character):
                return character
        for character in dict.fromkeys(text) if self._drops else ():
            if character not in self._dropped:
                self._dropped[character] = self._is_dropped(character)
            if self._dropped[character]:
                return character
        return None

    def _is_dropped(self, character: str) -> bool:
        ids = self._tokenizer(character, add_special_tokens=False)["input_ids"]
        if character.isspace() or self._tokenizer.unk_token_id in ids:
            return False
        shown = self._tokenizer.decode(ids).replace("\u2581", " ")
        return not shown.strip() or "\ufffd" in shown


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _placeholders(processor: Any) -> set[str]:
    """The texts that the processor replaces by an image or a video."""
    kinds = ("image_token", "image_placeholder_token", "video_token")
    names = (getattr(processor, name, None) for name in kinds)
    return {name for name in names if isinstance(name, str) and name}


def _around_messages(processor: Any, added: list[str]) -> set[str]:
    """Which of the `added` tokens the chat template writes around a user's text, or behind an
    answer's, as turns of a tokenizer whose `<|im_end|>` is not flagged as special."""
    added = [token for token in added if _BRACKETED.fullmatch(token) and token.strip()]
    if processor is None or not added:
        return set()
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROBE}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
    try:
        asked = processor.apply_chat_template([user], tokenize=False)
        whole = processor.apply_chat_template([user, answer], tokenize=False)
    except TemplateError:  # a template that refuses such a conversation
        return set()
    around = asked + whole.rpartition(_PROBE)[2]
    return {token for token in added if token in around}
