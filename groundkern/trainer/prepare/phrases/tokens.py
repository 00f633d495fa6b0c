"""Words of an English text: quotes whole, contractions apart from what they are written with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from groundkern.trainer.prepare.phrases.lexicon import AFTER_IS, AUXILIARIES, NOT_ING, PRONOUNS

_LETTER = r"[^\W_][\u0300-\u036f]*"
_TOKEN = re.compile(
    r'"[^"\n]{1,60}"|\u201c[^\u201d\n]{1,60}\u201d|`[^`\n]{1,60}`'
    r"|(?<!\w)'[^'\n]{1,60}'(?!\w)|\u2018[^\u2019\n]{1,60}\u2019(?!\w)"
    r"|[$\u20ac\u00a3\u00a5]\s?\d[\d,.]*\d|[$\u20ac\u00a3\u00a5]\s?\d|\d[\d,.]*\d\s?%|\d\s?%"
    r"|(?:Dr|Mr|Mrs|Ms|St|Prof|Jr|Sr|Mt|Fig|Inc|Ltd)\.|(?:e\.g|i\.e|etc|vs|cf|approx)\.|°[CF]\b"
    r"|(?:[A-Z]\.){2,}"
    rf"|(?:{_LETTER})+(?:[-'\u2019.,/](?:{_LETTER})+)*['\u2019]?|\n(?!\s*[a-z])|[^\w\s]"
)
_CLITIC = re.compile(r"(.+?)(['\u2019](?:re|ve|ll|m|d|s))", re.IGNORECASE)
_QUOTES = "\"'`\u201c\u2018"
_NEXT = re.compile(r"\s+([\w'\u2019-]+)(?:\s+([\w'\u2019-]+))?([^.;:!?\n]*)")
_FINITE = re.compile(r"(?<!\w)(?:is|are|was|were|has|have|had|can|will|looks?|seems?)(?!\w)")


@dataclass(frozen=True)
class Word:
    """A token of the text, characters `start:stop`."""

    text: str
    start: int
    stop: int

    @property
    def low(self) -> str:
        return self.text.lower().replace("\u2019", "'")

    @property
    def quoted(self) -> bool:
        """Whether it is a whole quote."""
        return len(self.text) > 2 and self.text[0] in _QUOTES and not self.text[-1].isalnum()


def words_of(text: str) -> list[Word]:
    """The words, quotes and other characters of a text.

    "she's" is two words; so is "the dog's" where a verb is meant and no owner. The start of a new
    line is a word of its own, unless it goes on in lower case.
    """
    found: list[Word] = []
    for match in _TOKEN.finditer(text):
        word = Word(match[0], match.start(), match.end())
        parts = None if word.quoted else _CLITIC.fullmatch(word.text)
        owns = parts is not None and parts[2][1:].lower() == "s"
        if parts is None or (owns and not _is_verb(parts[1].lower(), text, word.stop)):
            found.append(word)
            continue
        cut = word.start + len(parts[1])
        found += [
            Word(text[word.start : cut], word.start, cut),
            Word(text[cut : word.stop], cut, word.stop),
        ]
    return found


def _is_verb(owner: str, text: str, stop: int) -> bool:
    """Whether "'s" at `stop` is "is" or "has": by the word before it, else by those after it."""
    if owner in PRONOUNS or owner == "that":
        return owner != "one" and not owner.endswith(("one", "body"))
    after = _NEXT.match(text, stop)
    if after is None:
        return False
    following, second, rest = after[1].lower(), (after[2] or "").lower(), after[3]
    if following in AFTER_IS:
        return True
    if not following.endswith("ing") or following in NOT_ING or len(following) < 6:
        return False
    if not second or second in AFTER_IS or second in AUXILIARIES:
        return second not in AUXILIARIES
    return not _FINITE.search(rest)  # "the dog's wagging tail is long" has another verb
