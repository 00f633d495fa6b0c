"""What phrases (HIST) and the texts of regions (logit lens, patch-text contrast) supervise.

Each function returns fields of a batch (`SampleFields`) and counts what it found and what was lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from groundkern.hf.data.example import Phrase, message_text
from groundkern.hf.data.labels import Encoded
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields


def phrase_rows(layout: Layout, counts: Counter[str]) -> SampleFields:
    """HIST: a row `i - 1` for each token `i` of each phrase, and the composites among the phrases.

    A phrase that contains exactly two others ("two dogs and a cat": "two dogs", "a cat"), not
    counting what these contain, is the composite of the two. A phrase that truncation cut into is
    left out, and its composites with it; so is one of weight 0.

    Args:
        layout: the sequence.
        counts: adds to `phrases`, `phrases_truncated`, `phrases_untrained`, `phrases_gated` (of
            weight 0), `phrase_rows`, `subject_rows`, `composites`.

    Returns:
        `phrase_position`, `phrase_number`, `phrase_subject`, `phrase_weight`, `phrase_composite`.

    Source: (H1) to (H3), (W1).
    """
    rows: list[tuple[int, int, int, float]] = []
    numbers: dict[int, int] = {}  # of the phrases that were not cut
    cut = 0
    for index, phrase in enumerate(layout.example.phrases):
        if not layout.trains(phrase):
            counts["phrases_untrained"] += 1
            continue
        if not layout.teaches(phrase):
            counts["phrases_gated"] += 1
            continue
        positions = layout.text_positions(phrase, f"phrases[{index}]")
        if None in positions or not positions:
            cut += 1
            continue
        number = numbers[index] = len(numbers)
        subject: set[int | None] = set()
        if phrase.subject is not None:
            start, stop = phrase.subject
            own = replace(phrase, start=start, stop=stop)
            subject.update(layout.text_positions(own, f"phrases[{index}].subject"))
        weight = layout.example.weight_of(phrase)
        there = (p for p in positions if p is not None)
        rows += [(p - 1, number, int(p in subject), weight) for p in there]
    whole = [three for three in composites(layout.example.phrases) if numbers.keys() >= set(three)]
    counts["phrases"] += len(layout.example.phrases)
    counts["phrases_truncated"] += cut
    counts["phrase_rows"] += len(rows)
    counts["subject_rows"] += sum(on_subject for _, _, on_subject, _ in rows)
    counts["composites"] += len(whole)
    names = ("phrase_position", "phrase_number", "phrase_subject", "phrase_weight")
    return {
        **dict(zip(names, zip(*rows))),
        "phrase_composite": [[numbers[index] for index in three] for three in whole],
    }


def composites(phrases: tuple[Phrase, ...]) -> list[tuple[int, int, int]]:
    """Find the phrases that are made of exactly two others.

    Args:
        phrases: of one example.

    Returns:
        (whole, first, second) indices.
    """
    found = []
    for whole, phrase in enumerate(phrases):
        within = [i for i, other in enumerate(phrases) if _contains(phrase, other)]
        parts = [i for i in within if not any(_contains(phrases[j], phrases[i]) for j in within)]
        parts.sort(key=lambda i: phrases[i].start)
        if len(parts) == 2 and phrases[parts[0]].stop <= phrases[parts[1]].start:
            found.append((whole, parts[0], parts[1]))
    return found


def _contains(whole: Phrase, part: Phrase) -> bool:
    """Whether `part` is a piece of `whole` and not all of it."""
    spans = (whole.start, whole.stop), (part.start, part.stop)
    inside = whole.start <= part.start and part.stop <= whole.stop
    return whole.turn == part.turn and inside and spans[0] != spans[1]


def lens_rows(
    layout: Layout,
    masks: list[Tensor],
    encode: Callable[[str], Encoded],
    outside: float | None,
    counts: Counter[str],
) -> SampleFields:
    """Logit lens: for each concept of an image, the visual tokens on its regions and some off them.

    A concept is the first label of a region's text. Regions of the same concept are one object,
    which counts as much as the weightiest of them.

    Args:
        layout: the sequence.
        masks: of `region_masks`.
        encode: of `WordEncoder`.
        outside: how many tokens off the object there are for each on it, evenly spaced over the
            image; None: all.
        counts: adds to `lens_rows`, `lens_rows_inside` and `lens_dropped_...`: regions whose
            concept has no label, or one digit of a longer number.

    Returns:
        `lens_position`, `lens_label`, `lens_inside`, `lens_weight`.

    Source: (L1), (L2), (W1).
    """
    rows: list[tuple[int, int, int, float]] = []
    for (image, label), (mask, weight) in _concepts(layout, masks, encode, counts, "lens"):
        on = mask.nonzero()[:, 0]
        off = ((layout.table[:, 0] == image) & ~mask).nonzero()[:, 0]
        wanted = len(off) if outside is None else min(len(off), round(outside * len(on)))
        off = off[torch.arange(wanted) * len(off) // max(1, wanted)]
        for chosen, inside in ((on, 1), (off, 0)):
            rows += [(p, label, inside, weight) for p in layout.visual[chosen].tolist()]
    counts["lens_rows"] += len(rows)
    counts["lens_rows_inside"] += sum(inside for _, _, inside, _ in rows)
    names = ("lens_position", "lens_label", "lens_inside", "lens_weight")
    return dict(zip(names, zip(*rows)))


def contrast_rows(
    layout: Layout, masks: list[Tensor], encode: Callable[[str], Encoded], counts: Counter[str]
) -> SampleFields:
    """Patch-text contrast: the visual tokens on the regions of an image's words, of which there are
    at least two.

    Words are concepts, as in `lens_rows`. An image with one word alone has nothing to tell it from:
    it has no rows.

    Args:
        layout: the sequence.
        masks: of `region_masks`.
        encode: of `WordEncoder`.
        counts: adds to `contrast_rows`, `contrast_words`, `contrast_words_alone` (the only one of
            their image) and `contrast_dropped_...` as `lens_rows` does.

    Returns:
        `contrast_position`, `contrast_label`, `contrast_weight`, `contrast_bag`.

    Source: (B4), (W1).
    """
    example = layout.example
    bags: list[list[int]] = [[] for _ in (*example.images, *example.videos)]
    found = list(_concepts(layout, masks, encode, counts, "contrast"))
    for (image, label), _ in found:
        bags[image].append(label)
    said: dict[int, list[int]] = {}  # words of each visual token
    weights: dict[int, float] = {}
    for (image, label), (mask, weight) in found:
        if len(bags[image]) > 1:
            for token in layout.visual[mask].tolist():
                said.setdefault(token, []).append(label)
                weights[token] = max(weight, weights.get(token, 0.0))
    alone = sum(len(bag) == 1 for bag in bags)
    bags = [bag if len(bag) > 1 else [] for bag in bags]
    counts["contrast_rows"] += len(said)
    counts["contrast_words"] += sum(map(len, bags))
    counts["contrast_words_alone"] += alone
    rows = sorted(said.items())
    return {
        "contrast_position": [position for position, _ in rows],
        "contrast_label": [labels for _, labels in rows],
        "contrast_weight": [weights[position] for position, _ in rows],
        "contrast_bag": bags,
    }


def _concepts(
    layout: Layout,
    masks: list[Tensor],
    encode: Callable[[str], Encoded],
    counts: Counter[str],
    kind: str,
) -> Iterator[tuple[tuple[int, int], tuple[Tensor, float]]]:
    """(image, first label) of each concept, sorted, with bool [C] the visual tokens on its regions
    and the largest of their weights."""
    concepts: dict[tuple[int, int], Tensor] = {}
    weights: dict[tuple[int, int], float] = {}
    for region, mask in zip(layout.example.regions, masks):
        if not layout.teaches(region):
            continue
        message = layout.example.messages[region.turn]
        found = encode(message_text(message)[region.start : region.stop])
        if found.unusable or found.alone == "digit":
            counts[f"{kind}_dropped_{found.unusable or found.alone}"] += 1
        elif mask.any():
            key = layout.example.place(region), found.labels[0].token
            concepts[key] = concepts[key] | mask if key in concepts else mask
            weights[key] = max(layout.example.weight_of(region), weights.get(key, 0.0))
    yield from ((key, (concepts[key], weights[key])) for key in sorted(concepts))
