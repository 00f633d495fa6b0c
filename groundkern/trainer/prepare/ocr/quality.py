"""Whether what was read of a page is worth keeping."""

from __future__ import annotations

from collections.abc import Sequence

from groundkern.trainer.prepare.ocr.scripts import ALONE
from groundkern.trainer.prepare.ocr.settings import OcrWord

SURE = 0.5  # confidence from which a word counts
MIN_KEPT = 0.4  # share of the words that must not fall away
MIN_WORDS = 5  # a reading of fewer words is not judged


def letters(words: Sequence[OcrWord]) -> int:
    """Letters and digits of the words."""
    return sum(char.isalnum() for word in words for char in word.text)


def worth(words: Sequence[OcrWord]) -> float:
    """Letters and digits of the sure words, each times its confidence; lone ones do not count."""
    return sum(
        word.confidence * letters([word])
        for word in words
        if word.confidence >= SURE and not _lone(word)
    )


def complaint(words: Sequence[OcrWord], *, min_confidence: float, min_kept: float) -> str | None:
    """Why a reading is not worth keeping, with figures; None if it is.

    A word falls away if it is unsure, has no letter or digit, or is a lone letter. A reading of
    fewer than `MIN_WORDS` words is not judged.

    Args:
        words: all that was read.
        min_confidence: below it a word is unsure.
        min_kept: share of the words that must not fall away.
    """
    reasons = {"unsure": 0, "without letters": 0, "lone letters": 0}
    for word in words:
        if word.confidence < min_confidence:
            reasons["unsure"] += 1
        elif not letters([word]):
            reasons["without letters"] += 1
        elif _lone(word):
            reasons["lone letters"] += 1
    fallen = sum(reasons.values())
    if len(words) < MIN_WORDS or len(words) - fallen >= min_kept * len(words):
        return None
    figures = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    return f"{fallen} of {len(words)} words fall away: {figures}"


def _lone(word: OcrWord) -> bool:
    """One letter by itself; not a digit, nor a character of a script without spaces."""
    kept = [char for char in word.text if char.isalnum()]
    return len(kept) == 1 and kept[0].isalpha() and not ALONE.match(kept[0])
