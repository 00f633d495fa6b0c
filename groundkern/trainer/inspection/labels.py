"""What the labels of words are worth: a table, and a sentence about what cannot be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MOST_USELESS = 0.02  # share of the kept words
MOST_OF_ONE = 0.2  # share of all labels, of one label
ENOUGH = 50  # labels that one can have a share of
FREQUENT = 10  # labels in the table


@dataclass(frozen=True)
class LabelTable:
    """The labels of the words of some samples.

    Args:
        counts: words, those that label a visual token, and the others by reason; in the order of
            the table.
        frequent: the most frequent labels, as the tokenizer shows them, and their share.
        warnings: sentences.
    """

    counts: dict[str, str]
    frequent: dict[str, str]
    warnings: list[str]


def label_table(
    counts: Counter, labels: Counter[tuple[int, ...]], text: Callable[[int], str]
) -> LabelTable | None:
    """The table; None without a word.

    Args:
        counts: of `GroundingCollator`.
        labels: how many visual tokens have each label, or set of labels.
        text: what a token shows.
    """
    words = counts["words"]
    if not words:
        return None
    dropped, useless = (_by_reason(counts, f"words_{what}_") for what in ("dropped", "useless"))
    lost, total = dropped.total() + counts["words_shared_token"], labels.total()
    kept = words - lost
    rows = {"words": f"{words:,}", "kept": f"{kept:,} ({kept / words:.1%})"}
    rows |= {f"dropped: {why}": f"{n:,} ({n / words:.1%})" for why, n in dropped.most_common()}
    if shared := counts["words_shared_token"]:
        rows["dropped: on a visual token with another"] = f"{shared:,} ({shared / words:.1%})"
    rows["visual tokens labelled"] = f"{total:,}"
    rows["distinct labels"] = f"{len(labels):,}"
    bad = useless.total() / max(1, kept)
    rows["useless labels"] = f"{useless.total():,} ({bad:.1%} of kept)"
    rows |= {f"useless: {why}": f"{n:,}" for why, n in useless.most_common()}
    shares = {
        " ".join(repr(text(token)) for token in ids): n / total
        for ids, n in labels.most_common(FREQUENT)
    }
    warnings = []
    if bad > MOST_USELESS:
        why = ", ".join(f"{n:,} {why}" for why, n in useless.most_common())
        warnings.append(f"of the words kept, {bad:.1%} have a label that says nothing ({why})")
    for label, share in shares.items():
        if total >= ENOUGH and share > MOST_OF_ONE:
            warnings.append(f"{share:.1%} of the labelled visual tokens have the label {label}")
    return LabelTable(rows, {label: f"{share:.1%}" for label, share in shares.items()}, warnings)


def _by_reason(counts: Counter, start: str) -> Counter[str]:
    reasons = {name: n for name, n in counts.items() if name.startswith(start) and n}
    return Counter({name.removeprefix(start): n for name, n in reasons.items()})
