"""DV-SFT's labels: which visual token reads which word (METHODS.md section 2, image-to-label).

Like `layout`, this turns what an example says into rows of token positions, and counts what is
lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.example import Word

ON_SHARED_TOKEN = ("drop", "last", "largest")


class WordLabel(NamedTuple):
    """The `token`-th visual token of the sample, of image `image`, reads `label`.

    `word` is the index of the word among the sample's words.
    """

    token: int
    label: int
    image: int
    word: int


@dataclass
class WordLabeler:
    """Puts each word on the visual token under its box's bottom-right corner.

    Args:
        tokenizer: gives a word its tokens; the first one is the label.
        leading_space: tokenise the word with a space in front. A first token that is only white
            space says nothing (Llama's, or a digit's in Qwen): such a word is tokenised without the
            space.
        max_tokens: words of more tokens are dropped.
        max_patches: words taller than so many visual tokens are dropped.
        on_shared_token: two words on one visual token: "drop" both, keep the "last" or the
            "largest" box.
    """

    tokenizer: Any
    leading_space: bool = True
    max_tokens: int = 3
    max_patches: float = 3
    on_shared_token: str = "drop"
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = self.on_shared_token in ON_SHARED_TOKEN
        require(
            known,
            "on_shared_token",
            " or ".join(map(repr, ON_SHARED_TOKEN)),
            repr(self.on_shared_token),
        )

    def place(self, words: Sequence[Word], table: Tensor, counts: Counter) -> list[WordLabel]:
        """Labels of one sample, by visual token.

        Args:
            words: the sample's words.
            table: [n, 5] of `image_geometry`.
            counts: `words`, `word_rows` and the reasons for dropping are added up here.
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
        for token, readings in sorted(on_token.items()):
            kept = self._choose(readings, words)
            counts["words_shared_token"] += len(readings) - len(kept)
            placed += [WordLabel(token, encoded[i][0], words[i].image, i) for i in kept]
        counts["word_rows"] += len(placed)
        return placed

    def first_token(self, text: str) -> int | None:
        """The label of a text; None where it has no token."""
        ids = self._tokens(text)
        return ids[0] if ids else None

    def _choose(self, readings: list[int], words: Sequence[Word]) -> list[int]:
        if len(readings) == 1:
            return readings
        match self.on_shared_token:
            case "drop":
                return []
            case "last":
                return readings[-1:]
            case _:
                return [max(readings, key=lambda i: _area(words[i]))]

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


def _area(word: Word) -> float:
    x0, y0, x1, y1 = word.box
    return (x1 - x0) * (y1 - y0)


def _under_corner(words: list[Word], table: Tensor) -> list[int]:
    """The visual token that holds the last pixel of each word's box, -1 where none does.

    Where several do (a tile's and the global view's), the smallest: it shows the word best.
    """
    if not words or table.shape[0] == 0:
        return [-1] * len(words)
    corner = torch.tensor([word.box[2:] for word in words], dtype=table.dtype)  # [m, 2]
    image = torch.tensor([word.image for word in words], dtype=table.dtype)
    low, high = table[None, :, 1:3], table[None, :, 3:5]
    slack = 1e-9  # rounding; closed at the far side: a box that ends on an edge ends in that token
    p = corner[:, None]
    hit = ((low + slack < p) & (p <= high + slack)).all(-1) & (table[None, :, 0] == image[:, None])
    area = (high - low).prod(-1).where(hit, torch.inf)  # [m, n]
    return torch.where(hit.any(-1), area.argmin(-1), -1).tolist()
