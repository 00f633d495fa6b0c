"""DV-SFT's labels: which visual token shows which printed word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.example import Word
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.padding import SampleFields

LABEL_BAGS = ("distinct", "multiset")
ON_SHARED_TOKEN = ("drop", "last", "largest")


class WordLabel(NamedTuple):
    """A word on the visual token that shows its end."""

    token: int  # among the sample's visual tokens
    label: int  # a token id
    image: int
    word: int  # among the sample's words


@dataclass
class WordLabeler:
    """Puts each word on the visual token under its box's bottom-right corner.

    Args:
        tokenizer: turns a word into tokens; the first one is the label.
        leading_space: tokenise the word with a space in front. If the first token then is white
            space alone (Llama's, or a digit's in Qwen), the word is tokenised without the space.
        max_tokens: words of more tokens are dropped.
        max_patches: words taller than this many visual tokens are dropped.
        on_shared_token: of several words on one visual token, "drop" all, or label it with the
            "last" one or with the one whose box is "largest".

    Raises:
        ValueError: an unknown `on_shared_token`.

    Source: DV-SFT, arXiv 2605.26656 (image-to-label).
    """

    tokenizer: Any
    leading_space: bool = True
    max_tokens: int = 3
    max_patches: float = 3
    on_shared_token: str = "drop"
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = self.on_shared_token in ON_SHARED_TOKEN
        wanted = " or ".join(map(repr, ON_SHARED_TOKEN))
        require(known, "on_shared_token", wanted, repr(self.on_shared_token))

    def place(self, words: Sequence[Word], table: Tensor, counts: Counter) -> list[WordLabel]:
        """Find the visual token of each word.

        Args:
            words: the sample's words.
            table: [C, 5] of `image_geometry`.
            counts: adds to `words`, `word_rows`, `words_shared_token` and `words_dropped_...`.

        Returns:
            Labels in the order of the visual tokens.
        """
        counts["words"] += len(words)
        encoded = [self._tokens(word.text) for word in words]
        counts["words_dropped_blank"] += sum(not ids for ids in encoded)
        counts["words_dropped_long"] += sum(len(ids) > self.max_tokens for ids in encoded)
        fit = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= self.max_tokens]
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
            placed += [WordLabel(token, encoded[i][0], words[i].image, i) for i in chosen]
        counts["word_rows"] += len(placed)
        return placed

    def first_token(self, text: str) -> int | None:
        """The label of a text.

        Args:
            text: a word or more.

        Returns:
            A token id; None if the text has no token.
        """
        ids = self._tokens(text)
        return ids[0] if ids else None

    def _choose(self, sharing: list[int], words: Sequence[Word]) -> list[int]:
        if len(sharing) == 1:
            return sharing
        match self.on_shared_token:
            case "drop":
                return []
            case "last":
                return sharing[-1:]
            case _:
                return [max(sharing, key=lambda i: _area(words[i]))]

    def _tokens(self, text: str) -> list[int]:
        text = text.strip()
        if text not in self._known:
            ids = self._encode(" " + text if self.leading_space and text else text)
            if ids and not self.tokenizer.decode(ids[:1]).strip():
                ids = self._encode(text)
            self._known[text] = ids
        return self._known[text]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def word_rows(layout: Layout, labels: Sequence[WordLabel], bag: str = "distinct") -> SampleFields:
    """DV-SFT: the labelled visual tokens, and the labels of each image among which it smooths.

    Args:
        layout: the sequence.
        labels: of `WordLabeler.place`.
        bag: an image's labels are its "distinct" ones, or the "multiset" of all of them.

    Returns:
        `word_position`, `word_label`, `word_bag`.

    Source: (D3).
    """
    collect = set if bag == "distinct" else list
    images = range(len(layout.example.images))
    return {
        "word_position": layout.visual[[w.token for w in labels]],
        "word_label": [w.label for w in labels],
        "word_bag": [sorted(collect(w.label for w in labels if w.image == i)) for i in images],
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
