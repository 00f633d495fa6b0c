"""DV-SFT's labels: which visual token shows which printed word."""

from __future__ import annotations

import re
import unicodedata
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
from groundkern.hf.data.texts import TextRules

LABEL_BAGS = ("distinct", "multiset")
ON_SHARED_TOKEN = ("drop", "last", "largest")
BYTE_FRAGMENTS = ("drop", "keep")

# spaces, control and format characters: a word of nothing else shows nothing
_FORMATS = {0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)}
_INVISIBLE = "".join(
    character
    for character in map(chr, (*range(0x3100), 0xFEFF))
    if character.isspace() or unicodedata.category(character) == "Cc" or ord(character) in _FORMATS
)
_BYTE_TOKEN = re.compile("<0x[89A-F][0-9A-F]>")  # SentencePiece: part of a character beyond ASCII


class WordLabel(NamedTuple):
    """A word on the visual token that shows its end."""

    token: int  # among the sample's visual tokens
    label: int  # a token id
    image: int
    word: int  # among the sample's words


class Encoded(NamedTuple):
    """A text as tokens, of which the first is its label.

    Args:
        ids: token ids, without white space in front.
        unusable: why the first is no label: "blank" (there is none), "special" (a special token),
            "fragment" (the first byte or bytes of a character); None: it is one.
    """

    ids: list[int]
    unusable: str | None


@dataclass
class WordLabeler:
    """Puts each word on the visual token under its box's bottom-right corner.

    A word is text, also one that spells a special token of the tokenizer.

    Args:
        tokenizer: turns a word into tokens; the first one is the label.
        leading_space: tokenise the word with a space in front. If the first token then is white
            space alone (Llama's, or a digit's in Qwen) or part of a character, the word is
            tokenised without the space.
        max_tokens: words of more tokens are dropped.
        max_patches: words taller than this many visual tokens are dropped.
        on_shared_token: of several words on one visual token, "drop" all, or label it with the
            "last" one or with the one whose box is "largest".
        byte_fragments: a word whose first token is only a part of its first character (a rare
            Chinese one, an emoji) has a label that it shares with hundreds of others: "drop" it, or
            "keep" it.
        rules: what counts as a special token; None: what the tokenizer says.

    Raises:
        ValueError: an unknown `on_shared_token` or `byte_fragments`.

    Source: DV-SFT, arXiv 2605.26656 (image-to-label).
    """

    tokenizer: Any
    leading_space: bool = True
    max_tokens: int = 3
    max_patches: float = 3
    on_shared_token: str = "drop"
    byte_fragments: str = "drop"
    rules: TextRules | None = None
    _known: dict[str, Encoded] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, known in (
            ("on_shared_token", ON_SHARED_TOKEN),
            ("byte_fragments", BYTE_FRAGMENTS),
        ):
            value = getattr(self, name)
            require(value in known, name, " or ".join(map(repr, known)), repr(value))
        if self.rules is None:
            self.rules = TextRules(self.tokenizer)

    def use(self, rules: TextRules) -> None:
        """Go by other rules; what is known of words by the old ones is forgotten.

        Args:
            rules: what counts as a special token.
        """
        self.rules = rules
        self._known.clear()

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
        encoded = [self.encode(word.text) for word in words]
        fit = []
        for i, (ids, unusable) in enumerate(encoded):
            why = unusable or ("long" if len(ids) > self.max_tokens else None)
            if why:
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
            placed += [WordLabel(token, encoded[i].ids[0], words[i].image, i) for i in chosen]
        counts["word_rows"] += len(placed)
        return placed

    def encode(self, text: str) -> Encoded:
        """The tokens of a text.

        Args:
            text: a word or more.
        """
        text = text.strip(_INVISIBLE)
        if text not in self._known:
            self._known[text] = self._encoded(text)
        return self._known[text]

    def first_token(self, text: str) -> int | None:
        """The label of a text.

        Args:
            text: a word or more.

        Returns:
            A token id; None if the text has no token that can be one.
        """
        ids, unusable = self.encode(text)
        return None if unusable else ids[0]

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

    def _encoded(self, text: str) -> Encoded:
        ids = self._ids(" " + text if self.leading_space and text else text)
        shown = self._shown(ids)
        if ids and (not shown or _is_fragment(shown)):
            ids = self._ids(text)
            shown = self._shown(ids)
        while ids and not shown:  # a tokenizer that puts a space of its own in front
            ids = ids[1:]
            shown = self._shown(ids)
        if not ids:
            return Encoded(ids, "blank")
        if ids[0] in self.rules.ids and self.rules.special(text):
            return Encoded(ids, "special")
        fragment = _is_fragment(shown) and self.byte_fragments == "drop"
        return Encoded(ids, "fragment" if fragment else None)

    def _ids(self, text: str) -> list[int]:
        """Token ids of characters: a special token's letters count as such."""
        more = {"split_special_tokens": True} if self.rules.special(text) else {}
        return self.tokenizer(text, add_special_tokens=False, **more)["input_ids"]

    def _shown(self, ids: list[int]) -> str:
        """What the first token shows by itself."""
        return self.tokenizer.decode(ids[:1]).strip(_INVISIBLE) if ids else ""


def _is_fragment(shown: str) -> bool:
    """Whether a token's text begins within a character: U+FFFD stands for incomplete bytes."""
    return shown.startswith("\ufffd") or _BYTE_TOKEN.match(shown) is not None


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
