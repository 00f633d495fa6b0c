"""What becomes of words under one tokenizer: kept, dropped and why, useless, how many labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.labels.texts import WORDS, numbers, words, wrapped
from groundkern.hf.data.labels import WordEncoder
from groundkern.hf.data.words import WordLabeler


@dataclass
class Found:
    """Counts over some words.

    Args:
        words: how many.
        dropped: by reason.
        useless: of those kept, by reason.
        labels: how often each label, or set of labels, was given.
    """

    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    useless: Counter[str] = field(default_factory=Counter)
    labels: Counter[tuple[int, ...]] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Words with a label."""
        return self.words - self.dropped.total()


def find(tokenizer: Any, texts: Iterable[str], **options: Any) -> Found:
    """The labels of words.

    Args:
        tokenizer: a fast one.
        texts: the words.
        options: arguments of `WordEncoder`.
    """
    labeler = WordLabeler(WordEncoder(tokenizer, **options))
    found = Found()
    for text in texts:
        word = labeler.encoder.encode(text)
        found.words += 1
        if why := labeler.why_dropped(word):
            found.dropped[why] += 1
            continue
        found.labels[tuple(label.token for label in word.labels)] += 1
        if word.useless:
            found.useless[word.useless] += 1
    return found


def groups(count: int, only: Iterable[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """The kinds of words that are looked at.

    Args:
        count: words of a language at most.
        only: these; None: all.
    """
    kinds = {
        "numbers": lambda: numbers(2000),
        "in punctuation": lambda: wrapped(words("English", count)),
        **{language: partial(words, language, count) for language in WORDS},
    }
    for kind in kinds if only is None else only:
        yield kind, kinds[kind]()


def row(tokenizer: Any, found: Found) -> list[str]:
    """Cells: words, kept, useless of kept, distinct labels, the most frequent, dropped.

    Args:
        tokenizer: shows the labels.
        found: of `find`.
    """
    kept = max(1, found.kept)
    useless = f"{found.useless.total() / kept:.1%}"
    useless += "".join(f", {count} {why}" for why, count in found.useless.most_common())
    most = "-"
    if found.labels:
        ((ids, count),) = found.labels.most_common(1)
        shown = " ".join(repr(tokenizer.decode([each])) for each in ids)
        most = f"`{shown}` {count / kept:.1%}"
    dropped = ", ".join(f"{count} {why}" for why, count in found.dropped.most_common()) or "-"
    share = f"{found.kept / max(1, found.words):.1%}"
    return [f"{found.words}", share, useless, f"{len(found.labels)}", most, dropped]
