"""Noun phrases of English captions by rules: closed word classes, suffixes, and neighbours.

A phrase is a base noun phrase: from its determiner to its head noun, without what hangs on it by a
preposition or a clause ("a man", "a black hat" in "a man in a black hat"). No tagger decides
whether a word is a verb; its ending and its neighbours do ("a surfer rides a wave": after "a", no
plural can be the head). How often that is right is measured: docs/data/prepare-marks.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from groundkern.trainer.prepare.phrases.lexicon import (
    ADJECTIVE_ENDINGS,
    ADJECTIVES,
    ADVERBS,
    APPROXIMATE,
    AUXILIARIES,
    COMPLEX,
    CONJUNCTIONS,
    CONJUNCTS,
    DETERMINERS,
    LY_NOUNS,
    MAGNITUDES,
    MODALS,
    MONTHS,
    NOT_ADJECTIVES,
    NOT_ED,
    NOT_ING,
    NOUNS_TOO,
    NUMBERS,
    PAST,
    PLURAL_MODIFIERS,
    PLURALS,
    POSSESSIVES,
    PREPOSITIONS,
    PRONOUNS,
    QUANTITIES,
    SHORT_DATES,
    SINGULAR,
    SUPERLATIVES_NOT,
    VERBS,
    WEEKDAYS,
)
from groundkern.trainer.prepare.phrases.tokens import Word, words_of

AMOUNT = re.compile(r"[$\u20ac\u00a3\u00a5]|\d.*%$")
DATE_MODIFIERS = {"the", "last", "next", "this", "every", "each", "early", "late", "of", ",", "."}


@dataclass(frozen=True)
class NounPhrase:
    """Characters `start:stop`; its head noun is `head`."""

    start: int
    stop: int
    head: tuple[int, int]


def noun_phrases(text: str) -> list[NounPhrase]:
    """The base noun phrases of `text`, in order and without overlap.

    Pronouns, bare numbers, dates and quoted text do not count; amounts with a unit ("12%",
    "$4.2 million") are. "A lot of", "a couple of" and their like belong to the noun they count.
    """
    words = words_of(text)
    found = []
    i, before = 0, ""
    while i < len(words):
        skipped = next((len(c) for c in COMPLEX if _reads(words, i, c)), 0)
        if skipped:
            i, before = i + skipped, "preposition"
            continue
        scan = _Scan(words, i, before)
        stop, head = scan.phrase()
        if stop is None:
            kind = _kind(words, i)
            before = before if (kind, before) == ("adverb", "modal") else kind
            i += 1
            continue
        if not _dated(words, i, stop):
            spot = words[head].start, words[head].stop
            found.append(NounPhrase(words[i].start, words[stop - 1].stop, spot))
        i, before = (stop + 1, "verb") if scan.verb == stop else (stop, "noun")
    return found


def is_date(text: str) -> bool:
    """Whether a text is a date, such as "last Monday", "May 5" or "the 14th of July"."""
    words = words_of(text)
    return _dated(words, 0, len(words))


def _dated(words: list[Word], start: int, stop: int) -> bool:
    """Whether words are a date: nothing but months, days and numbers, as "last Monday", "May 5"."""
    named = 0
    for word in words[start:stop]:
        name = word.low in MONTHS | WEEKDAYS or word.low.removesuffix(".") in SHORT_DATES
        named += name and (word.text[0].isupper() or _beside_number(words, start, stop))
        if not (name or word.low in NUMBERS | DATE_MODIFIERS or word.text[0].isdigit()):
            return False
    return named > 0


def _beside_number(words: list[Word], start: int, stop: int) -> bool:
    around = words[max(0, start - 1) : start] + words[start : stop + 1]
    return any(word.text[0].isdigit() for word in around)


class _Scan:
    """One attempt to read a noun phrase at word `first`; `before` is the kind of word before it."""

    def __init__(self, words: list[Word], first: int, before: str) -> None:
        self.words, self.first, self.before = words, first, before
        self.singular = False
        self.noun: int | None = None  # the last noun so far
        self.verb: int | None = None  # the verb that ended the phrase

    def phrase(self) -> tuple[int | None, int]:
        """(stop, head), in words; stop None: no phrase here."""
        words, at = self.words, self._opening()
        opened = at > self.first and not words[at - 1].text[0].isdigit()
        amount = self.first + (self._low(self.first) in APPROXIMATE)
        if amount < len(words) and AMOUNT.match(words[amount].text) and not self._share(amount):
            more = self._low(amount + 1) in MAGNITUDES
            return amount + 1 + more, amount + more
        while at < len(words) and (step := self._step(at)):
            at += step
        if self.noun is not None:
            return self.noun + 1, self.noun
        while at > self.first and words[at - 1].quoted:
            at -= 1
        if opened and at - self.first > 1 and self._low(at - 1) in ADJECTIVES:
            return at, at - 1  # "the left"
        return None, 0

    def _opening(self) -> int:
        """Where modifiers begin: after determiners, possessives and numbers."""
        words, at = self.words, self.first
        low = self._low(at)
        quantity = at + (low == "a")
        if self._low(quantity) in QUANTITIES and self._low(quantity + 1) == "of" and (
            low == "a" or self._low(quantity).endswith("s") or low == "plenty"
        ):  # fmt: skip
            at = quantity + 2
            low = self._low(at)
        if low in ("all", "both", "half") and self._low(at + 1) in DETERMINERS | POSSESSIVES:
            at += 1
            low = self._low(at)
        if low in DETERMINERS and not self._relative(at):
            self.singular = low in SINGULAR
            at += 1
        elif low in POSSESSIVES:
            at += 1
        if self._low(at) in APPROXIMATE and self._number(at + 1) and self._open(at + 2):
            at += 1
        while at < len(words) and self._number(at):
            at += 1
        return at

    def _step(self, at: int) -> int:
        """How many words of the phrase start at word `at`; 0 if it ends before."""
        low, word = self._low(at), self.words[at]
        if word.quoted:
            return int(at > self.first and self.noun is None)
        if low in ("and", ",", "or") and self._pair(at):
            return 1
        if not self._open(at) or (low in DETERMINERS and low not in ADJECTIVES):
            return int(low in ("other", "more") and at == self.first + 1)
        if self._number(at):
            return int(self.noun is None)
        if low.endswith(("'s", "s'")):
            self.noun, self.singular = None, False
            return 1
        if self._verb(at):
            self.verb = at
            return 0
        if self._low(at + 1) == "than":
            return 0
        if at == self.first and low in CONJUNCTS and self._low(at + 1) == ",":
            return 0
        if low in ADVERBS or self._adverb(at):
            following = self._low(at + 1)
            bare = self._participle(at + 1) and not self._open(at + 2)
            onward = self._adjective(at + 1) or following.endswith(("ed", "ing", "ly"))
            return int(self.noun is None and onward and not bare)
        if self._adjective(at):
            heads = not self._open(at + 1) or self._verb_after(at)
            if self.noun is None:
                return 1
            if low in NOUNS_TOO and self.noun == at - 1 and not self._open(at + 1):
                self.noun = at
                return 1
            return int(not heads and self.noun == at - 1 and self._low(at) not in ADJECTIVES)
        if self.noun is None and at > self.first and self._participle(at) and self._open(at + 1):
            return 1
        self.noun = at
        return 1

    def _verb(self, at: int) -> bool:
        """Whether the open-class word at `at` is a verb rather than part of the phrase."""
        low, following = self._low(at), self._low(at + 1)
        starts_line = at == 0 or self.words[at - 1].text in ".!?:\n*"
        if self.words[at].text[0].isupper() and not starts_line:
            return False
        after_noun = self.noun is not None and self.noun == at - 1
        opens = at == self.first
        if not after_noun and not opens:
            return False  # after a determiner or an adjective everything is a modifier or a noun
        closed = following in DETERMINERS | POSSESSIVES | PRONOUNS or self._counted(at + 1)
        if self._participle(at):
            if after_noun:
                return True
            modifies = self._open(at + 1) and not self._verb_after(at)
            modifies = modifies and following not in ADVERBS
            return not (modifies and self.before in ("preposition", "", "conjunction", "comma"))
        stem = _stem(low)
        if opens:
            starts = self.before in ("noun", "auxiliary", "pronoun", "to", "adverb")
            known = low in VERBS or stem in VERBS or low in PAST
            imperative = closed and (self.before == "" or (self.before == "comma" and known))
            if self.before == "modal":
                return True
            if low != stem and known and self.before in ("conjunction", "comma"):
                onward = following in ADVERBS | PREPOSITIONS or following in ("", ".")
                return closed or (onward and self.before == "conjunction")
            third_person = self.before == "pronoun" and low != stem
            return imperative or third_person or (known and starts)
        plural = self._plural(self.noun) or self.before == "conjunction"
        if low in PAST:
            return True
        if low != stem:  # the third person of a verb, or a plural
            return stem in VERBS or (not plural and (closed or self.singular or self._onward(at)))
        return plural and (low in VERBS or following in DETERMINERS | POSSESSIVES)

    def _onward(self, at: int) -> bool:
        """Whether a noun comes after the word, which then is no plural: "the label lists dates"."""
        if self.words[at].low in PLURAL_MODIFIERS or not self._open(at + 1):
            return False
        return self._plural(at + 1) and not self._verb_after(at) and not self._adverb(at + 1)

    def _counted(self, at: int) -> bool:
        """Whether a quote, a number or an amount starts at a word."""
        word = self.words[at] if at < len(self.words) else None
        return word is not None and (
            word.quoted or self._number(at) or bool(AMOUNT.match(word.text))
        )

    def _share(self, at: int) -> bool:
        """Whether a percentage says how much of the noun after it: "19 % VAT"."""
        following = self._low(at + 1)
        if not self._low(at).endswith("%") or not self._open(at + 1) or self._number(at + 1):
            return False
        verbal = _stem(following) in VERBS or following in PAST or self._participle(at + 1)
        listed = following in ADVERBS | DETERMINERS | CONJUNCTS
        return not (verbal or listed or self._adverb(at + 1) or following == "year")

    def _adverb(self, at: int) -> bool:
        low = self._low(at)
        named = at > 0 and low and self.words[at].text[0].isupper() and self._starts(at) is False
        return low.endswith("ly") and low not in ADJECTIVES | LY_NOUNS and not named

    def _starts(self, at: int) -> bool:
        return at == 0 or not self.words[at - 1].text[-1].isalnum()

    def _verb_after(self, at: int) -> bool:
        return _stem(self._low(at + 1)) in VERBS and self._low(at + 1) != _stem(self._low(at + 1))

    def _participle(self, at: int) -> bool:
        low = self._low(at)
        if "-" in low or low in ADJECTIVES:
            return False
        if low.endswith("ing") and len(low) > 4:
            return low not in NOT_ING
        return low.endswith("ed") and len(low) > 3 and low not in NOT_ED

    def _adjective(self, at: int) -> bool:
        low = self._low(at)
        if low in NOT_ADJECTIVES:
            return False
        hyphen = "-" in low and low.endswith(("ed", "en", "ing", "old", "decker", "up", "like"))
        superlative = low.endswith("est") and len(low) > 5 and low not in SUPERLATIVES_NOT
        return low in ADJECTIVES or low.endswith(ADJECTIVE_ENDINGS) or hyphen or superlative

    def _pair(self, at: int) -> bool:
        """Whether the word joins two adjectives of one noun: "black and white stripes"."""
        if self.noun is not None or at == self.first or not self._adjective(at - 1):
            return False
        return self._adjective(at + 1) and (self._open(at + 2) or self._low(at + 2) == "and")

    def _plural(self, at: int) -> bool:
        low = self._low(at)
        return low in PLURALS or (_stem(low) != low and not low.endswith(("ss", "us", "is")))

    def _relative(self, at: int) -> bool:
        """Whether "that" opens a clause and no phrase."""
        return self._low(at) == "that" and self.before in ("noun", "verb", "")

    def _number(self, at: int) -> bool:
        low = self._low(at)
        if low.endswith("%") and self._share(at):
            return True
        return bool(re.fullmatch(r"\d[\d,./]*(st|nd|rd|th|s)?", low)) or low in NUMBERS

    def _open(self, at: int) -> bool:
        """Whether there is a word of an open class: not a closed one, not punctuation."""
        low = self._low(at)
        closed = PREPOSITIONS | AUXILIARIES | CONJUNCTIONS | PRONOUNS | POSSESSIVES
        return (
            bool(low)
            and (low[0].isalnum() or low in ("°c", "°f"))
            and not low.endswith("n't")
            and low not in closed
            and low not in ("a", "an", "the")
        )

    def _low(self, at: int) -> str:
        return self.words[at].low if at < len(self.words) else ""


def _stem(low: str) -> str:
    """A word without the ending of a plural or a third person."""
    if low.endswith("ies") and len(low) > 4:
        return low[:-3] + "y"
    if low.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return low[:-2]
    return low[:-1] if low.endswith("s") and not low.endswith(("ss", "us", "is")) else low


def _kind(words: list[Word], at: int) -> str:
    low = words[at].low
    if low == "to":
        return "to" if at + 1 < len(words) and words[at + 1].low in VERBS else "preposition"
    for kind, members in (
        ("preposition", PREPOSITIONS),
        ("modal", MODALS),
        ("auxiliary", AUXILIARIES),
        ("conjunction", CONJUNCTIONS),
        ("comma", {",", ";"}),
        ("pronoun", PRONOUNS),
        ("adverb", ADVERBS),
    ):
        if low in members:
            return kind
    if low.endswith("n't"):
        return "modal" if low[:-3] in MODALS | {"ca", "wo", "sha"} else "auxiliary"
    if not low[0].isalnum():
        return ""
    return "adverb" if low.endswith("ly") else "verb"


def _reads(words: list[Word], at: int, wanted: tuple[str, ...]) -> bool:
    return tuple(word.low for word in words[at : at + len(wanted)]) == wanted
