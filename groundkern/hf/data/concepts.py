"""Rows of phrases (HIST) and of concepts (logit lens): what an example says, as token positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from groundkern.hf.data.example import Phrase, message_text
from groundkern.hf.data.layout import Layout


@dataclass
class PhraseRows:
    """`position[k]` predicts a token of phrase `number[k]`; `subject[k]` is 1 on its head noun."""

    position: list[int] = field(default_factory=list)
    number: list[int] = field(default_factory=list)
    subject: list[int] = field(default_factory=list)
    composite: list[tuple[int, int, int]] = field(default_factory=list)  # whole, first, second


@dataclass
class LensRows:
    """Visual token `token[k]` should say `label[k]` if `inside[k]`, and should not if not."""

    token: list[int] = field(default_factory=list)  # among the sample's visual tokens
    label: list[int] = field(default_factory=list)
    inside: list[int] = field(default_factory=list)


def phrase_rows(layout: Layout, counts: Counter) -> PhraseRows:
    """A row `i - 1` for each token `i` of each phrase, and the composites among the phrases.

    A phrase that contains exactly two others ("two dogs and a cat": "two dogs", "a cat"), not
    counting what these contain, is the composite of the two. A phrase that truncation cut into is
    left out, and its composites with it.
    """
    rows, numbers, lost = PhraseRows(), {}, set()
    for index, phrase in enumerate(layout.example.phrases):
        positions = layout.region_positions(phrase)
        if None in positions or not positions:
            lost.add(index)
            continue
        number = numbers[index] = len(numbers)
        subject: set[int | None] = set()
        if phrase.subject is not None:
            start, stop = phrase.subject
            subject.update(layout.region_positions(replace(phrase, start=start, stop=stop)))
        for p in positions:
            rows.position.append(p - 1)
            rows.number.append(number)
            rows.subject.append(int(p in subject))
    for three in composites(layout.example.phrases):
        if not lost & set(three):
            rows.composite.append(tuple(numbers[index] for index in three))
    counts["phrases"] += len(layout.example.phrases)
    counts["phrases_truncated"] += len(lost)
    counts["phrase_rows"] += len(rows.position)
    counts["subject_rows"] += sum(rows.subject)
    counts["composites"] += len(rows.composite)
    return rows


def composites(phrases: tuple[Phrase, ...]) -> list[tuple[int, int, int]]:
    """(whole, first, second) indices of every phrase that is made of exactly two others."""
    found = []
    for whole, phrase in enumerate(phrases):
        within = [i for i, other in enumerate(phrases) if _contains(phrase, other)]
        parts = [i for i in within if not any(_contains(phrases[j], phrases[i]) for j in within)]
        parts.sort(key=lambda i: phrases[i].start)
        if len(parts) == 2 and phrases[parts[0]].stop <= phrases[parts[1]].start:
            found.append((whole, *parts))
    return found


def _contains(whole: Phrase, part: Phrase) -> bool:
    """Whether `part` is a piece of `whole` and not all of it."""
    spans = (whole.start, whole.stop), (part.start, part.stop)
    inside = whole.start <= part.start and part.stop <= whole.stop
    return whole.turn == part.turn and inside and spans[0] != spans[1]


def lens_rows(
    layout: Layout,
    masks: list[Tensor],
    label_of: Callable[[str], int | None],
    outside: float | None,
    counts: Counter,
) -> LensRows:
    """For each concept of an image, the visual tokens on its regions and some that are off them.

    A concept is the first token of a region's text. Regions of the same concept are one object.

    Args:
        layout: the sequence.
        masks: the visual tokens of each region, bool [n].
        label_of: the token of a text; None where it has none.
        outside: how many tokens off the object to take for one on it, evenly spaced over the image;
            None: all.
        counts: `lens_rows`, `lens_rows_inside` are added up here.
    """
    concepts: dict[tuple[int, int], Tensor] = {}
    for region, mask in zip(layout.example.regions, masks):
        message = layout.example.messages[region.turn]
        label = label_of(message_text(message)[region.start : region.stop])
        if label is not None and mask.any():
            key = region.image, label
            concepts[key] = concepts[key] | mask if key in concepts else mask
    rows = LensRows()
    for (image, label), mask in sorted(concepts.items(), key=lambda item: item[0]):
        inside = mask.nonzero()[:, 0]
        off = ((layout.table[:, 0] == image) & ~mask).nonzero()[:, 0]
        wanted = len(off) if outside is None else min(len(off), round(outside * len(inside)))
        off = off[torch.arange(wanted) * len(off) // max(1, wanted)]
        for chosen, side in ((inside, 1), (off, 0)):
            rows.token += chosen.tolist()
            rows.label += [label] * len(chosen)
            rows.inside += [side] * len(chosen)
    counts["lens_rows"] += len(rows.token)
    counts["lens_rows_inside"] += sum(rows.inside)
    return rows
