"""Text as tokens that compare equal when people would call it the same text.

Unicode NFKC, case, punctuation, quotes and accents typed as two characters do not count, and "&"
is "and"; numbers count by value ("1,234" = "1234", "12.0" = "12"); percent and currency signs are
kept beside the number, so that "45%" can prefer "45%" over "45". Scripts written without spaces
are cut into single characters.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_SAME = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\u2019": "'"}
)
_BLANK = {number: " " for number in range(128) if chr(number).isspace()}
_CURRENCY = "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c) == "Sc")
_CONFUSED = str.maketrans("il|o", "1110")  # letters that OCR reads for digits
# Letters that are no accents and yet part of the letter before them: the vowels and finals of
# Hangul, and vowel signs of Indic scripts, where a text is written in the normal form D.
_JOINING = re.compile(
    "[\u1161-\u1175\u11a8-\u11c2\u09be\u09d7\u0b3e\u0b56\u0b57\u0bbe\u0bd7\u0cc2\u0cd5\u0cd6\u0d3e"
    "\u0d57\u0dcf\u0ddf\u102e\u1b35\U00011127\U0001133e\U00011357\U000113b8\U000113bb\U000113c2"
    "\U000113c5\U000113c7-\U000113c9\U000114b0\U000114ba\U000114bd\U000115af\U0001611e-\U00016120"
    "\U00011930\U00016d63\U00016d67\U00016d68]"
)
_NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_NUMBER = r"\d+\u2044\d+|\d{1,3}(?:[ '\u2019]\d{3})+(?:[.,]\d+)?(?!\d)|\d+(?:[.,]\d+)*"
_TOKEN = re.compile(
    rf"(?P<number>(?<![^\W{_NO_SPACES}])(?P<sign>(?<![\w.)\]])-)?(?:(?P<before>[{_CURRENCY}])\s?)?"
    rf"(?P<digits>{_NUMBER}|[.,]\d+)(?![^\W_{_NO_SPACES}])"
    rf"(?:\s?(?P<after>%|[{_CURRENCY}]|per\s?cent\b))?)"
    rf"|(?P<single>[{_NO_SPACES}])"
    rf"|(?P<ampersand>&)"
    rf"|(?P<possessive>(?<=\w)'s\b)"
    rf"|(?P<word>[^\W_{_NO_SPACES}]+(?:['.][^\W\d_{_NO_SPACES}]+)*?(?='s\b)"
    rf"|[^\W_{_NO_SPACES}]+(?:['.][^\W_{_NO_SPACES}]+)*)"
)


@dataclass(frozen=True)
class Token:
    """One word or number.

    Args:
        key: what is compared: the folded word, or the number's canonical decimal form.
        sign: "%", a currency sign, or "".
        start, stop: its characters in the text, without the sign.
        outer: the same, with the sign.
        surface: the characters `start:stop` themselves.
        number: whether `key` is a number's value.
    """

    key: str
    sign: str
    start: int
    stop: int
    outer: tuple[int, int]
    surface: str
    number: bool


def tokens(text: str) -> list[Token]:
    """The tokens of `text` in order, with their characters (Unicode code points) in it."""
    folded, origin = _folded(text)
    found = []
    for match in _TOKEN.finditer(folded):
        kind = match.lastgroup if match.lastgroup in ("single", "possessive", "ampersand") else None
        if match["number"] is not None:
            found.append(_number(match, text, origin))
            continue
        start, stop = origin[match.start()], origin[match.end() - 1] + 1
        stop = max(stop, _cluster_end(text, stop))
        key = match[0] if kind else match["word"].replace("'", "").replace(".", "")
        key = "and" if key == "&" else key
        found.append(Token(key, "", start, stop, (start, stop), text[start:stop], False))
    return found


def edges(text: str, first: Token, last: Token, *, sentence: bool) -> tuple[str, str]:
    """The punctuation that touches tokens of `text`, before and after them.

    Args:
        text: the tokens' text.
        first, last: the tokens at both ends.
        sentence: whether a full stop at the end of a sentence is left out.
    """
    lead = re.search(r"[^\w\s]*$", text[: first.outer[0]])[0]
    trail = re.match(r"[^\w\s]*", text[last.outer[1] :])[0]
    after = text[last.outer[1] + len(trail) :]
    if sentence and trail.endswith(".") and re.match(r"\s*$|\s+[^\W\d_a-z]", after):
        trail = trail[:-1]
    return lead, trail


def unconfused(key: str) -> str | None:
    """A key of letters and digits with "l", "i", "o" as the digits they look like; None: not a mix.

    "Ql" and "Q1" come out equal where either holds a digit.
    """
    folded = key.translate(_CONFUSED)
    mixed = any(c.isdigit() for c in folded) and any(c.isalpha() for c in folded)
    return folded if mixed else None


def value(digits: str) -> str:
    """The canonical form of a written number: "1,234.50" -> "1234.5", "1.234,5" -> "1234.5".

    A single comma or dot before exactly three digits is a thousands separator if it is a comma and
    a decimal point if it is a dot; dots or commas that repeat, or the first of the two kinds, are
    thousands separators if groups of three follow. What fits no reading ("1.2.3") and whole
    numbers with leading zeros ("007") are returned as they are.
    """
    plain = re.sub(r"[ '\u2019]", "", digits)
    kinds = re.sub(r"\d", "", plain)
    grouped = re.fullmatch(r"[1-9]\d{0,2}(?:([.,])\d{3})(?:\1\d{3})*(?:(?!\1)[.,]\d+)?", plain)
    if grouped and (len(kinds) > 1 or kinds == ","):
        separator = grouped[1]
        plain = plain.replace(separator, "").replace(",", ".")
    elif len(kinds) == 1:
        plain = plain.replace(",", ".")
    elif kinds:
        return digits
    whole, _, fraction = plain.partition(".")
    if len(whole) > 1 and whole.startswith("0"):
        return digits
    fraction = fraction.rstrip("0")
    return f"{whole or '0'}.{fraction}" if fraction else whole or "0"


def _number(match: re.Match, text: str, origin: list[int]) -> Token:
    key = ("-" if match["sign"] else "") + value(match["digits"])
    after = "%" if (match["after"] or "").startswith("per") else match["after"]
    start, stop = origin[match.start("digits")], origin[match.end("digits") - 1] + 1
    if match["sign"] and not match["before"]:
        start = origin[match.start()]
    outer = (origin[match.start()], origin[match.end() - 1] + 1)
    sign = match["before"] or after or ""
    return Token(key, sign, start, stop, outer, text[start:stop], True)


def _folded(text: str) -> tuple[str, list[int]]:
    """NFKC and casefold, cluster by cluster, and where in `text` each character comes from."""
    if text.isascii():  # the usual case: nothing combines, nothing changes its length
        return text.lower().translate(_BLANK), list(range(len(text)))
    folded, origin = [], []
    start = 0
    while start < len(text):
        stop = _cluster_end(text, start + 1)
        cluster = unicodedata.normalize("NFKC", text[start:stop]).casefold().translate(_SAME)
        cluster = "".join(" " if c.isspace() else c for c in cluster)
        folded.append(cluster)
        origin.extend([start] * len(cluster))
        start = stop
    return "".join(folded), origin


def _cluster_end(text: str, stop: int) -> int:
    while stop < len(text) and (unicodedata.combining(text[stop]) or _JOINING.match(text[stop])):
        stop += 1
    return stop
