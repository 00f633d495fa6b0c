"""Counts over a whole file, and sentences about what looks wrong in it; no line is parsed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from groundkern.trainer.data.dataset import JsonLinesDataset


@dataclass
class Summary:
    """Counts over the whole file, and sentences about what looks wrong."""

    counts: dict[str, int]
    tasks: dict[str, int]
    warnings: list[str]


def summarise(dataset: JsonLinesDataset, odd: dict[str, np.ndarray]) -> Summary:
    """What the index of a data set tells of all its usable samples.

    Args:
        dataset: the samples.
        odd: of `oddities`.
    """
    counts = {"samples": len(dataset)}
    for kind in ("images", "videos", "frames", "regions", "words", "phrases"):
        if kind in ("videos", "frames") and not dataset.counts[kind].any():
            continue
        counts[kind] = int(dataset.counts[kind].sum(dtype=np.int64))
    for kind in ("regions", "words", "phrases"):
        counts[f"samples with {kind}"] = int(np.count_nonzero(dataset.counts[kind]))
    found = sorted(odd.items(), key=lambda each: -int(each[1].sum()))
    warnings = [
        f"samples {why}: {which.sum():,} "
        f"(first: {dataset.path.name}:{dataset.lines[which.argmax()]})"
        for why, which in found
        if which.any()
    ]
    if dataset.bad:
        warnings.insert(0, f"lines that cannot be used: {len(dataset.bad):,} (listed below)")
    return Summary(counts, dict(Counter(dataset.tasks).most_common()), warnings)


def oddities(dataset: JsonLinesDataset) -> dict[str, np.ndarray]:
    """What a sample may have but is rarely meant: by name, which samples have it, [N] bool."""
    counts = dataset.counts
    return {
        "without supervision": counts["regions"] + counts["words"] + counts["phrases"] == 0,
        "with regions, words or phrases of weight 0": counts["gated"] > 0,
        "with an empty answer": counts["answers_empty"] > 0,
        "with a region box over more than half of its image": counts["regions_wide"] > 0,
        "with the same word in the same box twice": counts["words_twice"] > 0,
    }
