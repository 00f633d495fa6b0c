"""Character and word error rates of text that was read from an image.

A rate of a data set is the sum of edits over the sum of lengths, not the mean of the samples' rates
(a page counts more than a word), so each function returns both. An empty gold has a length of 1:
what a model writes on an empty page then counts, which no edit over a length of 0 could.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import jiwer
from rapidfuzz.distance import Levenshtein

Golds = str | Sequence[str]
Counted = tuple[float, float]


def as_written(text: str) -> str:
    """Accents composed (NFC), runs of white space, line breaks included, as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def plain(text: str) -> str:
    """`as_written` in compatible forms (NFKC), without case and punctuation (categories P)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = (c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split())


def cer(predicted: str, gold: Golds, *, normalise: Callable[[str], str] = as_written) -> Counted:
    """Edits between characters, and the number of the gold's characters.

    Insertions, deletions and substitutions of code points cost 1 each, spaces included, as in
    `jiwer.cer(gold, predicted)`; the rate may exceed 1.

    Args:
        predicted: what the model wrote.
        gold: the text of the image; several: the one with the lowest rate.
        normalise: applied to both texts first: `as_written`, `plain`, or your own.

    Returns:
        (edits, characters), the latter at least 1.

    Source: Levenshtein 1966; jiwer's `cer`.
    """
    predicted = normalise(predicted)
    return _lowest(
        [(Levenshtein.distance(text, predicted), len(text)) for text in _texts(gold, normalise)]
    )


def wer(predicted: str, gold: Golds, *, normalise: Callable[[str], str] = as_written) -> Counted:
    """Edits between words, and the number of the gold's words; see `cer`.

    Words are what white space separates, so a text in Chinese or Japanese is a single word: use
    `cer` there.

    Returns:
        (edits, words), the latter at least 1.

    Source: jiwer's `wer`.
    """
    predicted = normalise(predicted)
    counted = []
    for text in _texts(gold, normalise):
        found = jiwer.process_words(text, predicted)
        edits = found.substitutions + found.deletions + found.insertions
        counted.append((edits, found.hits + found.substitutions + found.deletions))
    return _lowest(counted)


def _texts(gold: Golds, normalise: Callable[[str], str]) -> list[str]:
    return [normalise(text) for text in ([gold] if isinstance(gold, str) else gold)]


def _lowest(counted: list[tuple[int, int]]) -> Counted:
    if not counted:
        return 0.0, 0.0
    pairs = [(float(edits), float(max(1, length))) for edits, length in counted]
    return min(pairs, key=lambda pair: pair[0] / pair[1])
