"""Noun phrases of English captions by rules: closed word classes, suffixes, and neighbours.

A phrase is a base noun phrase: from its determiner to its head noun, without what hangs on it by a
preposition or a clause ("a man", "a black hat" in "a man in a black hat"). No tagger decides
whether a word is a verb; its ending and its neighbours do ("a surfer rides a wave": after "a", no
plural can be the head). How often that is right is measured: docs/prepare-marks.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r'"[^"\n]{1,60}"|\u201c[^\u201d\n]{1,60}\u201d'
    r"|[$\u20ac\u00a3\u00a5]\s?\d[\d,.]*\d|[$\u20ac\u00a3\u00a5]\s?\d|\d[\d,.]*\d\s?%|\d\s?%"
    r"|(?:Dr|Mr|Mrs|Ms|St|Prof)\.|(?:[A-Z]\.){2,}"
    r"|(?:[^\W_][\u0300-\u036f]*)+(?:[-'\u2019.,/](?:[^\W_][\u0300-\u036f]*)+)*['\u2019]?|[^\w\s]"
)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SINGULAR = _set("a an this that each every another either neither")
_DETERMINERS = _SINGULAR | _set(
    "the these those some any no several many few most much more fewer other various both all"
)
_POSSESSIVES = _set("my your his her its our their whose")
_PRONOUNS = _set(
    "i you he she it we they me him us them who whom which what there here someone somebody "
    "anyone everyone everybody something anything everything nothing himself herself itself "
    "themselves mine yours hers ours theirs one's where when why how"
)
_PREPOSITIONS = _set(
    "of in on at by for with from to into onto over under above below behind beside besides "
    "between among through across along around near against toward towards upon inside outside "
    "within without during before after until since off out up down past like as beneath "
    "underneath alongside amid beyond per via despite except about than atop aboard while "
    "because if although though whether unless"
)
_AUXILIARIES = _set(
    "is are was were be been being am has have had having do does did can could will would "
    "shall should may might must isn't aren't wasn't weren't doesn't don't didn't hasn't "
    "haven't can't cannot won't let's it's there's that's"
)
_CONJUNCTIONS = _set("and or but nor so yet & plus")
_ADVERBS = _set(
    "very quite too also not just only still then now away back together apart upside again "
    "ahead almost already always never often soon even ever once twice well rather perhaps "
    "forward sideways overhead nearby indoors outdoors yes no please slightly more most less "
    "least"
)
_APPROXIMATE = _set("about around nearly almost over roughly approximately exactly only under")
_NUMBERS = _set(
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty "
    "hundred thousand million billion dozen first second third fourth fifth last next half"
)
_MAGNITUDES = _set("hundred thousand million billion trillion")
_MONTHS = _set(
    "january february march april may june july august september october november december"
)
_QUANTITIES = _set("lot lots couple number bunch dozens hundreds thousands plenty variety")
_ADJECTIVES = _set(
    "red orange yellow green blue purple pink brown black white gray grey golden silver beige "
    "dark light bright pale colorful colourful blond blonde striped small little tiny big large "
    "huge giant enormous tall short long wide narrow thick thin high low deep shallow old young "
    "new elderly ancient modern vintage antique fresh raw ripe hot cold warm cool wet dry clean "
    "dirty empty full open closed round square flat sharp smooth rough soft hard heavy happy "
    "sad angry cute beautiful pretty ugly nice good bad great fine busy quiet calm loud wooden "
    "plastic metallic stainless woolen different same similar single double several left right "
    "upper lower middle main public private local foreign urban rural wild tame bare blank "
    "clear cloudy sunny snowy rainy foggy sandy rocky grassy dusty muddy shiny fluffy furry "
    "fuzzy hairy leafy tasty lovely lonely friendly plain simple complex total whole entire "
    "previous current average daily weekly monthly annual yearly northern southern eastern "
    "western male female adult human live alive asleep awake alone available own such certain "
    "traditional electric acoustic digital stuffed broken worn torn lit hidden frozen fallen "
    "folded parked married retired abandoned incoming oncoming ongoing outdoor indoor"
)
_ADJECTIVE_ENDINGS = ("ful", "ous", "less", "able", "ible", "ish", "ive", "ular")
_NOT_ADJECTIVES = _set(
    "table vegetable cable fish dish radish relish british olive dive hive archive detective "
    "motive handful spoonful constable relative executive"
)
# Verbs whose third person is rarely a plural noun; others are recognised by their neighbours.
_VERBS = _set(
    "sit stand hold wear ride eat go run throw catch carry lie hang lean look watch wait jump "
    "fly swim climb drive pull push read write sing dance sleep smile laugh talk speak listen "
    "fill cook bake pour serve sell buy give take bring put get make become grow fall rise sink "
    "float sail row graze feed chase follow lead pass cross enter leave arrive depart approach "
    "reach touch grab kick hit toss swing bend kneel crouch stretch perform play pose gaze "
    "stare point appear seem contain include show depict display feature indicate represent "
    "illustrate compare describe suggest reveal increase decrease drop exceed equal remain stay "
    "keep belong consist cover surround overlook face rest stream shine glow burn blow pile "
    "celebrate gather walk stroll hike skate ski surf prepare repair build paint clean wash cut "
    "slice chop sniff lick bark wag rests hover land travel move turn open close start begin "
    "end stop use try help learn teach study work sign double triple"
)
_PAST = _set(
    "sat stood held wore rode ate went ran threw caught lay hung flew swam drove sang slept "
    "spoke gave took brought got made became grew fell rose sank left led met kept began showed "
    "shown seen given taken worn thrown eaten driven ridden written built sold bought found "
    "known lit set sets lies dressed"
)
_NOT_ING = _set(
    "building ceiling painting wedding clothing evening morning railing string ring king wing "
    "thing spring drawing lighting flooring icing frosting pudding dumpling duckling sibling "
    "sling herring earring awning landing crossing meeting opening setting wiring bedding "
    "filling heading"
)
_NOT_ED = _set("bed shed seed weed speed feed sled reed breed hundred creed bobsled steed red")
_PLURALS = _set(
    "people children men women sheep fish deer mice geese feet teeth police cattle oxen firemen "
    "policemen firefighters wolves knives leaves shelves loaves"
)
_COMPLEX_TEXT = """
in front of, on top of, next to, because of, in order to, at least, at most, for example,
as well as, instead of, close to, out of, in between, far from, in addition to, such as, close up,
according to
"""
_COMPLEX = tuple(tuple(words.split()) for words in _COMPLEX_TEXT.split(","))


@dataclass(frozen=True)
class Word:
    """A token of the text, characters `start:stop`."""

    text: str
    start: int
    stop: int

    @property
    def low(self) -> str:
        return self.text.lower().replace("\u2019", "'")


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
    words = [Word(m[0], m.start(), m.end()) for m in _TOKEN.finditer(text)]
    found = []
    i, before = 0, ""
    while i < len(words):
        skipped = next((len(c) for c in _COMPLEX if _reads(words, i, c)), 0)
        if skipped:
            i, before = i + skipped, "preposition"
            continue
        stop, head = _Scan(words, i, before).phrase()
        if stop is None:
            before = _kind(words, i)
            i += 1
            continue
        dated = words[head].low in _MONTHS and stop < len(words) and words[stop].text[0].isdigit()
        if not dated:
            spot = words[head].start, words[head].stop
            found.append(NounPhrase(words[i].start, words[stop - 1].stop, spot))
        i, before = stop, "noun"
    return found


class _Scan:
    """One attempt to read a noun phrase at word `first`; `before` is the kind of word before it."""

    def __init__(self, words: list[Word], first: int, before: str) -> None:
        self.words, self.first, self.before = words, first, before
        self.singular = False
        self.noun: int | None = None  # the last noun so far

    def phrase(self) -> tuple[int | None, int]:
        """(stop, head), in words; stop None: no phrase here."""
        words, at = self.words, self._opening()
        opened = at > self.first and not words[at - 1].text[0].isdigit()
        if re.match(r"[$\u20ac\u00a3\u00a5]|\d.*%$", words[self.first].text):
            more = self._low(self.first + 1) in _MAGNITUDES
            return self.first + 1 + more, self.first + more
        while at < len(words) and (step := self._step(at)):
            at += step
        if self.noun is not None:
            return self.noun + 1, self.noun
        while at > self.first and words[at - 1].text[0] in '"\u201c':
            at -= 1
        if opened and at - self.first > 1 and self._low(at - 1) in _ADJECTIVES:
            return at, at - 1  # "the left"
        return None, 0

    def _opening(self) -> int:
        """Where modifiers begin: after determiners, possessives and numbers."""
        words, at = self.words, self.first
        low = self._low(at)
        quantity = at + (low in ("a", "the"))
        if self._low(quantity) in _QUANTITIES and self._low(quantity + 1) == "of" and (
            low in ("a", "the") or self._low(quantity).endswith("s") or low == "plenty"
        ):  # fmt: skip
            at = quantity + 2
            low = self._low(at)
        if low in ("all", "both", "half") and self._low(at + 1) in _DETERMINERS | _POSSESSIVES:
            at += 1
            low = self._low(at)
        if low in _DETERMINERS and not self._relative(at):
            self.singular = low in _SINGULAR
            at += 1
        elif low in _POSSESSIVES:
            at += 1
        if self._low(at) in _APPROXIMATE and self._number(at + 1) and self._open(at + 2):
            at += 1
        while at < len(words) and self._number(at):
            at += 1
        return at

    def _step(self, at: int) -> int:
        """How many words of the phrase start at word `at`; 0 if it ends before."""
        low, word = self._low(at), self.words[at].text
        if word[0] in '"\u201c' and len(word) > 1:
            return int(at > self.first and self.noun is None)
        if low in ("and", ",", "or") and self._pair(at):
            return 1
        if not self._open(at) or (low in _DETERMINERS and low not in _ADJECTIVES):
            return int(low in ("other", "more") and at == self.first + 1)
        if self._number(at):
            return int(self.noun is None)
        if low.endswith(("'s", "s'")):
            self.noun, self.singular = None, False
            return 1
        if self._verb(at) or self._low(at + 1) == "than":
            return 0
        if low in _ADVERBS or (low.endswith("ly") and low not in _ADJECTIVES | {"family", "jelly"}):
            onward = self._adjective(at + 1) or self._low(at + 1).endswith(("ed", "ing", "ly"))
            return int(self.noun is None and onward)
        if self._adjective(at):
            heads = not self._open(at + 1) or self._verb_after(at)
            if self.noun is None:
                return 1
            return int(not heads and self.noun == at - 1 and self._low(at) not in _ADJECTIVES)
        if self.noun is None and at > self.first and self._participle(at) and self._open(at + 1):
            return 1
        self.noun = at
        return 1

    def _verb(self, at: int) -> bool:
        """Whether the open-class word at `at` is a verb rather than part of the phrase."""
        low, following = self._low(at), self._low(at + 1)
        if self.words[at].text[0].isupper() and at > 0 and self.words[at - 1].text not in ".!?:":
            return False
        after_noun = self.noun is not None and self.noun == at - 1
        opens = at == self.first
        if not after_noun and not opens:
            return False  # after a determiner or an adjective everything is a modifier or a noun
        closed = following in _DETERMINERS | _POSSESSIVES | _PRONOUNS
        if self._participle(at):
            if after_noun:
                return True
            modifies = self._open(at + 1) and not self._verb_after(at)
            return not (modifies and self.before in ("preposition", "", "conjunction"))
        stem = _stem(low)
        if opens:
            starts = self.before in ("noun", "auxiliary", "pronoun", "to", "adverb")
            known = low in _VERBS or stem in _VERBS or low in _PAST
            imperative = self.before == "" and closed
            third_person = self.before == "pronoun" and low != stem
            return imperative or third_person or (known and starts)
        plural = self._plural(self.noun) or self.before == "conjunction"
        if low in _PAST:
            return True
        if low != stem:  # the third person of a verb, or a plural
            return stem in _VERBS or (not plural and (closed or self.singular))
        return plural and (low in _VERBS or following in _DETERMINERS | _POSSESSIVES)

    def _verb_after(self, at: int) -> bool:
        return _stem(self._low(at + 1)) in _VERBS and self._low(at + 1) != _stem(self._low(at + 1))

    def _participle(self, at: int) -> bool:
        low = self._low(at)
        if "-" in low or low in _ADJECTIVES:
            return False
        if low.endswith("ing") and len(low) > 4:
            return low not in _NOT_ING
        return low.endswith("ed") and len(low) > 3 and low not in _NOT_ED

    def _adjective(self, at: int) -> bool:
        low = self._low(at)
        if low in _NOT_ADJECTIVES:
            return False
        hyphen = "-" in low and low.endswith(("ed", "en", "ing", "old", "decker", "up", "like"))
        return low in _ADJECTIVES or low.endswith(_ADJECTIVE_ENDINGS) or hyphen

    def _pair(self, at: int) -> bool:
        """Whether the word joins two adjectives of one noun: "black and white stripes"."""
        if self.noun is not None or at == self.first or not self._adjective(at - 1):
            return False
        return self._adjective(at + 1) and (self._open(at + 2) or self._low(at + 2) == "and")

    def _plural(self, at: int) -> bool:
        low = self._low(at)
        return low in _PLURALS or (_stem(low) != low and not low.endswith(("ss", "us", "is")))

    def _relative(self, at: int) -> bool:
        """Whether "that" opens a clause and no phrase."""
        return self._low(at) == "that" and self.before in ("noun", "verb", "")

    def _number(self, at: int) -> bool:
        low = self._low(at)
        return bool(re.fullmatch(r"\d[\d,./]*(st|nd|rd|th)?", low)) or low in _NUMBERS

    def _open(self, at: int) -> bool:
        """Whether there is a word of an open class: not a closed one, not punctuation."""
        low = self._low(at)
        closed = _PREPOSITIONS | _AUXILIARIES | _CONJUNCTIONS | _PRONOUNS | _POSSESSIVES
        return (
            bool(low) and low[0].isalnum() and low not in closed and low not in ("a", "an", "the")
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
        return "to" if at + 1 < len(words) and words[at + 1].low in _VERBS else "preposition"
    for kind, members in (
        ("preposition", _PREPOSITIONS),
        ("auxiliary", _AUXILIARIES),
        ("conjunction", _CONJUNCTIONS | {",", ";"}),
        ("pronoun", _PRONOUNS),
        ("adverb", _ADVERBS),
    ):
        if low in members:
            return kind
    if not low[0].isalnum():
        return ""
    return "adverb" if low.endswith("ly") else "verb"


def _reads(words: list[Word], at: int, wanted: tuple[str, ...]) -> bool:
    return tuple(word.low for word in words[at : at + len(wanted)]) == wanted
