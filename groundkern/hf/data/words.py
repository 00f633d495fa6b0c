"""DV-SFT's labels: which visual token shows which printed word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.example import Word
from groundkern.hf.data.labels import Encoded, Label, WordEncoder, merged
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields

LABEL_BAGS = ("distinct", "multiset")
ON_SHARED_TOKEN = ("drop", "last", "largest", "several")


class WordLabel(NamedTuple):
    """What the visual token that shows the end of a word, or of several, is to be read as."""

    token: int  # among the sample's visual tokens
    labels: tuple[Label, ...]  # distinct; the first is that of the first word
    image: int
    words: tuple[int, ...]  # among the sample's words


@dataclass(frozen=True)
class WordLabeler:
    """Puts each word on the visual token under its box's bottom-right corner.

    A word is text, also one that spells a special token of the tokenizer.

    Args:
        encoder: finds the labels of a word.
        max_tokens: words of more tokens are dropped.
        max_number_tokens: of a number, since many tokenizers have a token for each digit, and of
            every word if the encoder labels it with several of its tokens.
        max_patches: words taller than this many visual tokens are dropped.
        on_shared_token: of several words on one visual token, "drop" all, or label it with the
            "last" one, with the one whose box is "largest", or with "several": all of them.

    Raises:
        ValueError: an unknown `on_shared_token`.

    Source: DV-SFT, arXiv 2605.26656 (image-to-label).
    """

    encoder: WordEncoder
    max_tokens: int = 3
    max_number_tokens: int = 12
    max_patches: float = 3
    on_shared_token: str = "drop"

    def __post_init__(self) -> None:
        wanted = " or ".join(map(repr, ON_SHARED_TOKEN))
        known = self.on_shared_token in ON_SHARED_TOKEN
        require(known, "on_shared_token", wanted, repr(self.on_shared_token))

    def place(
        self, words: Sequence[Word], table: Tensor, counts: Counter[str], *, weight: float = 1.0
    ) -> list[WordLabel]:
        """Find the visual token of each word; those of weight 0 are as if they were not there.

        Args:
            words: the sample's words.
            table: [C, 5] of `image_geometry`.
            counts: adds to `words`, `word_rows`, `words_shared_token`, `words_gated` (of weight 0),
                `words_dropped_...`, and to `words_useless_...` for those that have a label of
                `labels.why_useless`.
            weight: of the sample.

        Returns:
            Labels in the order of the visual tokens.
        """
        counts["words"] += len(words)
        teaching = [i for i, word in enumerate(words) if weight * word.weight != 0]
        counts["words_gated"] += len(words) - len(teaching)
        encoded = {i: self.encoder.encode(words[i].text) for i in teaching}
        fit = []
        for i, each in encoded.items():
            if why := self.why_dropped(each):
                counts[f"words_dropped_{why}"] += 1
            else:
                fit.append(i)
        on_token: dict[int, list[int]] = {}  # indices of words
        for i, token in zip(fit, _under_corner([words[i] for i in fit], table)):
            word = words[i]
            if token < 0:
                counts["words_dropped_outside"] += 1
                continue
            _, _, top, _, bottom = table[token].tolist()
            if word.box[3] - word.box[1] > self.max_patches * (bottom - top) + 1e-9:
                counts["words_dropped_tall"] += 1
                continue
            on_token.setdefault(token, []).append(i)
        placed = []
        for token, sharing in sorted(on_token.items()):
            chosen = self._choose(sharing, words)
            counts["words_shared_token"] += len(sharing) - len(chosen)
            for i in chosen:
                if why := encoded[i].useless:
                    counts[f"words_useless_{why}"] += 1
            if chosen:
                labels = merged([label for i in chosen for label in encoded[i].labels])
                placed.append(WordLabel(token, labels, words[chosen[0]].image, tuple(chosen)))
        counts["word_rows"] += len(placed)
        return placed

    def why_dropped(self, word: Encoded) -> str | None:
        """Why a word labels no visual token, wherever it stands.

        Args:
            word: of the encoder.

        Returns:
            `Encoded.unusable`, or "long"; None: it may label one.
        """
        several = word.number or self.encoder.word_label == "several"
        most = self.max_number_tokens if several else self.max_tokens
        return word.unusable or ("long" if len(word.ids) > most else None)

    def _choose(self, sharing: list[int], words: Sequence[Word]) -> list[int]:
        if len(sharing) == 1:
            return sharing
        match self.on_shared_token:
            case "drop":
                return []
            case "last":
                return sharing[-1:]
            case "largest":
                return [max(sharing, key=lambda i: _area(words[i]))]
            case _:
                return sharing


def word_rows(layout: Layout, labels: Sequence[WordLabel], bag: str = "distinct") -> SampleFields:
    """DV-SFT: the labelled visual tokens, and the labels of each image among which it smooths.

    Args:
        layout: the sequence.
        labels: of `WordLabeler.place`.
        bag: an image's labels are its "distinct" ones, or the "multiset" of all of them.

    Returns:
        `word_position`, `word_label`, `word_weight` (the largest of its words), `word_bag`, and
        `several_label` and `several_weight` of the visual tokens that have more than one label.

    Source: (D3), (D5), (W1).
    """
    collect = set if bag == "distinct" else list
    example = layout.example
    bags: list[list[int]] = [[] for _ in (*example.images, *example.videos)]
    for word in labels:
        bags[word.image] += [label.token for label in word.labels]
    several = [word.labels if len(word.labels) > 1 else () for word in labels]
    return {
        "word_position": layout.visual[[word.token for word in labels]],
        "word_label": [word.labels[0].token for word in labels],
        "word_weight": [
            max(example.weight_of(example.words[i]) for i in word.words) for word in labels
        ],
        "word_bag": [sorted(collect(each)) for each in bags],
        "several_label": [[label.token for label in each] for each in several],
        "several_weight": [[label.weight for label in each] for each in several],
    }


def _area(word: Word) -> float:
    x0, y0, x1, y1 = word.box
    return (x1 - x0) * (y1 - y0)


def _under_corner(words: list[Word], table: Tensor) -> list[int]:
    """The visual token that holds the last pixel of each word's box; -1 if none does.

    If several do (a tile's and the global view's), the smallest: it shows the word best.
    """
    if not words or table.shape[0] == 0:
        return [-1] * len(words)
    corner = torch.tensor([word.box[2:] for word in words], dtype=table.dtype)  # [m, 2]
    image = torch.tensor([word.image for word in words], dtype=table.dtype)
    low, high = table[None, :, 1:3], table[None, :, 3:5]
    slack = 1e-9  # for rounding; a box that ends on the edge of two tokens ends in the first
    p = corner[:, None]
    hit = ((low + slack < p) & (p <= high + slack)).all(-1) & (table[None, :, 0] == image[:, None])
    area = (high - low).prod(-1).where(hit, torch.inf)  # [m, n]
    return torch.where(hit.any(-1), area.argmin(-1), -1).tolist()
