"""Scripts written without spaces: a character is a word, and no space stands between two."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Chinese characters, kana and their punctuation; Hangul has spaces.
ALONE = re.compile("[\u3001-\u30ff\u3190-\u9fff\uf900-\ufaff\uff01-\uff65\U00020000-\U0003ffff]")


def joined_text(words: Iterable[str]) -> str:
    """Words as one would print them: spaces between, but not beside a character that is a word."""
    text = ""
    for word in words:
        spaced = text and not (ALONE.match(text[-1]) or ALONE.match(word[:1]))
        text += f" {word}" if spaced else word
    return text
