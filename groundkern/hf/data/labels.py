"""What a printed word, or the text of a concept, has as its label: one token, or several.

A label is worth learning if it shows something of its word: `why_useless` says once what does not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from groundkern.checks import require
from groundkern.hf.data.texts import TextRules

BYTE_FRAGMENTS = ("drop", "keep")
NUMBER_LABELS = ("several", "first", "last", "drop")
WORD_LABELS = ("first", "several", "last")

# Characters that show nothing. Joiners, variation selectors and fillers shape what is beside them,
# so that they go only at the ends of a word; all others go everywhere.
_SHAPING = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x200C, 0x200D, 0x2800, 0x3164, 0xFFA0}
_SHAPING |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
_HIDDEN = {0xAD, 0x61C, 0xFEFF, 0x200B, *range(0x200E, 0x2010), *range(0x202A, 0x202F)}
_HIDDEN |= {*range(0x2060, 0x2070), *range(0xFFF0, 0xFFFC), *range(0xE0000, 0xE0080)}
_HIDDEN |= {code for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc"}
_SPACES = {code for code in range(0x3100) if chr(code).isspace()}
_REMOVED = dict.fromkeys(_HIDDEN - _SPACES)
_INVISIBLE = "".join(map(chr, _HIDDEN | _SHAPING | _SPACES))

_BYTE_TOKEN = re.compile("<0x[89A-F][0-9A-F]>")  # SentencePiece: part of a character beyond ASCII


class Label(NamedTuple):
    """A token that a word is to be read as.

    Args:
        token: its id.
        weight: the letters and digits that it shows, at least 1: what it counts for beside others.
    """

    token: int
    weight: int


class Encoded(NamedTuple):
    """A text as tokens, and which of them are its labels.

    Args:
        ids: token ids, without white space in front.
        labels: the first token, or others by the settings; empty where the text has none.
        unusable: why there is no label: "blank" (no token), "punctuation" (no letter or digit),
            "special" (a special token), "unknown" (the tokenizer's unknown token), "fragment" (the
            first byte or bytes of a character), "number" (not wanted); None: there is one.
        useless: of `why_useless`; None: the labels are worth learning, or there are none.
        alone: the same of the first label by itself.
        number: whether the first letter or digit is a decimal digit.
    """

    ids: list[int]
    labels: tuple[Label, ...]
    unusable: str | None
    useless: str | None = None
    alone: str | None = None
    number: bool = False


def why_useless(shown: Sequence[str], text: str) -> str | None:
    """Why labels say nothing of their word.

    Args:
        shown: what each label's token shows by itself; copies stay.
        text: the word.

    Returns:
        "blank" (white space alone), "fragment" (the first shows a part of a character),
        "punctuation" (no letter or digit), "digit" (one digit of a longer word, which hundreds of
        words share); None: they say something.
    """
    if not any(_visible(each) for each in shown):
        return "blank"
    if is_fragment(_visible(shown[0])):
        return "fragment"
    signs = [each for one in shown for each in one if is_sign(each)]
    if not signs:
        return "punctuation"
    alone = len(signs) == 1 and unicodedata.category(signs[0]) == "Nd"
    return "digit" if alone and sum(map(is_sign, text)) > 1 else None


@dataclass
class WordEncoder:
    """Finds the labels of words.

    Args:
        tokenizer: turns a word into tokens.
        leading_space: tokenise the word with a space in front. If the first token then is white
            space alone (Llama's, or a digit's in Qwen), part of a character or unknown, the word is
            tokenised without the space.
        byte_fragments: a word whose first token is only a part of its first character (a rare
            Chinese one, an emoji) has a label that it shares with hundreds of others: "drop" it, or
            "keep" it.
        strip_punctuation: leave out what stands before the first and behind the last letter or
            digit: brackets, quotes, commas, currencies, signs. A word of nothing else has no label.
        number_label: of a word whose first letter or digit is a digit ("1,234.50", "2nd"), the
            label is "several" tokens, all that show a letter or digit, each weighted by how many;
            the "first" of these, the "last", or none ("drop").
        word_label: of any other word, its "first" token, or of those that show a letter or digit
            and no part of a character "several", all of them, weighted by how many they show, or
            the "last"; its first where none does.
        rules: what counts as a special token; None: what the tokenizer says.

    Raises:
        ValueError: an unknown `byte_fragments`, `number_label` or `word_label`.
    """

    tokenizer: Any
    leading_space: bool = True
    byte_fragments: str = "drop"
    strip_punctuation: bool = True
    number_label: str = "several"
    word_label: str = "first"
    rules: TextRules | None = None
    _known: dict[str, Encoded] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, known in (
            ("byte_fragments", BYTE_FRAGMENTS),
            ("number_label", NUMBER_LABELS),
            ("word_label", WORD_LABELS),
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

    def encode(self, text: str) -> Encoded:
        """The tokens and labels of a text.

        Args:
            text: a word or more.
        """
        if text not in self._known:
            self._known[text] = self._encoded(text)
        return self._known[text]

    def _encoded(self, text: str) -> Encoded:
        visible = _visible(text.translate(_REMOVED))
        text = stripped(visible) if self.strip_punctuation else visible
        ids = self._word_ids(text)
        if not ids:
            return Encoded(ids, (), "punctuation" if visible and not text else "blank")
        first = next(filter(is_sign, text), "")
        number = first != "" and unicodedata.category(first) == "Nd"
        if number and self.number_label == "drop":
            return Encoded(ids, (), "number", number=True)
        labels = self._number_labels(ids) if number else self._later_labels(ids)
        labels = labels or [Label(ids[0], max(1, self._signs(ids[0])))]
        if any(label.token in self.rules.ids for label in labels) and self.rules.special(text):
            return Encoded(ids, (), "special", number=number)
        if labels[0].token == self.tokenizer.unk_token_id:
            return Encoded(ids, (), "unknown", number=number)
        shown = [self._shown(label.token) for label in labels]
        useless, alone = why_useless(shown, text), why_useless(shown[:1], text)
        if useless == "fragment" and self.byte_fragments == "drop":
            return Encoded(ids, (), "fragment", number=number)
        return Encoded(ids, merged(labels), None, useless, alone, number)

    def _word_ids(self, text: str) -> list[int]:
        """The tokens of a word, of which the first shows something."""
        if not text:
            return []
        ids = self._ids(" " + text) if self.leading_space else self._ids(text)
        if self.leading_space and ids and not self._begins(ids[0]):
            ids = self._ids(text)
        while ids and not _visible(self._shown(ids[0])):  # a tokenizer's own space in front
            ids = ids[1:]
        return ids

    def _begins(self, token: int) -> bool:
        """Whether a first token shows whole characters."""
        shown = _visible(self._shown(token))
        return shown != "" and not is_fragment(shown) and token != self.tokenizer.unk_token_id

    def _number_labels(self, ids: list[int]) -> list[Label]:
        """Those tokens of a number that show letters or digits and are wanted, one by one."""
        found = [Label(token, signs) for token in ids if (signs := self._signs(token))]
        match self.number_label:
            case "first":
                return found[:1]
            case "last":
                return found[-1:]
            case _:
                return found

    def _later_labels(self, ids: list[int]) -> list[Label]:
        """Those tokens of another word that are wanted beside its first or in its place."""
        if self.word_label == "first":
            return []
        whole = [token for token in ids if not is_fragment(_visible(self._shown(token)))]
        found = [Label(token, signs) for token in whole if (signs := self._signs(token))]
        return found if self.word_label == "several" else found[-1:]

    def _signs(self, token: int) -> int:
        """How many letters and digits a token shows."""
        shown = self._shown(token)
        if token == self.tokenizer.unk_token_id or _BYTE_TOKEN.match(shown):
            return 0
        return sum(map(is_sign, shown))

    def _ids(self, text: str) -> list[int]:
        """Token ids of characters: a special token's letters count as such."""
        more = {"split_special_tokens": True} if self.rules.special(text) else {}
        return self.tokenizer(text, add_special_tokens=False, **more)["input_ids"]

    def _shown(self, token: int) -> str:
        """What a token shows by itself; some decoders leave SentencePiece's space as it is."""
        return self.tokenizer.decode([token]).replace("\u2581", " ")


def merged(labels: Sequence[Label]) -> tuple[Label, ...]:
    """The distinct labels in their order, with the sums of their weights.

    Args:
        labels: of one visual token.
    """
    weights: dict[int, int] = {}
    for token, weight in labels:
        weights[token] = weights.get(token, 0) + weight
    return tuple(Label(token, weight) for token, weight in weights.items())


def stripped(text: str) -> str:
    """A text from its first to its last letter or digit, with the marks on this.

    Args:
        text: a word or more.

    Returns:
        The part; empty if there is no letter or digit.
    """
    signs = [index for index, each in enumerate(text) if is_sign(each)]
    if not signs:
        return ""
    stop = signs[-1] + 1
    while stop < len(text) and (unicodedata.category(text[stop])[0] == "M"):
        stop += 1
    return text[signs[0] : stop].strip(_INVISIBLE)


def is_sign(character: str) -> bool:
    """Whether a character is a letter or a number, of any script, that can be seen."""
    return unicodedata.category(character)[0] in "LN" and ord(character) not in _SHAPING


def is_fragment(shown: str) -> bool:
    """Whether a token's text begins within a character: U+FFFD stands for incomplete bytes."""
    return shown.startswith("\ufffd") or _BYTE_TOKEN.match(shown) is not None


def _visible(text: str) -> str:
    return text.strip(_INVISIBLE)
