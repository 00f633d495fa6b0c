"""Numbers as charts and models write them: signs, separators, currencies, percent, and years."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_LONGEST = 64  # characters of a number; more is text
# Digits in groups of three (of two and a last three, as in India), or without groups.
_GROUPED = (
    r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ ']\d{3})+|\d{1,3}(?:\.\d{3}){2,}"
)
_NUMBER = re.compile(rf"(?P<whole>{_GROUPED}|\d*)(?P<part>\.\d*)?(?P<power>e[+-]?\d{{1,3}})?")
_YEAR = re.compile(r"1[5-9]\d\d|20\d\d")


class Number(NamedTuple):
    """A number in a text: its value as written, and whether a percent sign follows it."""

    value: float
    percent: bool


def tidy(text: str) -> str:
    """Compatible forms as one (NFKC), every minus as "-", runs of white space as one space.

    Of a superscript digit NFKC makes an ordinary one, and of 10\u00b2 102; here it is 10^2.
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: f"^{match[0]}", text)
        text = unicodedata.normalize("NFKC", text).translate(_MINUS)
    return " ".join(text.split())


def number(text: str) -> Number | None:
    """The number that a text consists of; None if it is anything else.

    Read are: a sign before or behind the currency, any minus of Unicode; a currency sign before or
    behind (`$5`, `US$5`, `5 €`); groups of three digits by commas, spaces, apostrophes, and by
    points from two groups on (`1.234.567`); an exponent; `%` or "percent". A comma that groups
    nothing (`3,5`), words of magnitude (`5 million`, `5k`), fractions, powers (`10\u00b2`), units,
    NaN and infinity are text.
    """
    if len(text) > _LONGEST:
        return None
    text = tidy(text).lower()
    sign, text = _sign(text)
    for suffix in ("%", "percent", "per cent"):
        if text.endswith(suffix):
            percent, text = True, text.removesuffix(suffix).rstrip()
            break
    else:
        percent = False
    text, currency = _without_currency(text)
    if currency and sign is None:
        sign, text = _sign(text)
    match = _NUMBER.fullmatch(text)
    if not match or not any(c.isdigit() for c in text.partition("e")[0]):
        return None
    whole = re.sub(r"[,' ]", "", match["whole"])
    if whole.count(".") > 1:
        whole = whole.replace(".", "")
    value = float(f"{whole}{match['part'] or ''}{match['power'] or ''}")
    if value == float("inf"):
        return None
    return Number(-value if sign == "-" else value, percent)


def is_year(text: str) -> bool:
    """Whether a text is a year: four digits from 1500 to 2099 and nothing else."""
    return _YEAR.fullmatch(tidy(text)) is not None


def _sign(text: str) -> tuple[str | None, str]:
    return (text[0], text[1:].lstrip()) if text[:1] in ("+", "-") else (None, text)


def _without_currency(text: str) -> tuple[str, bool]:
    """(the text without a currency sign at its start or end, whether there was one)."""
    if text and unicodedata.category(text[-1]) == "Sc":
        return text[:-1].rstrip(), True
    start = re.match(r"[a-z]{0,3}", text).end()
    if start < len(text) and unicodedata.category(text[start]) == "Sc":
        return text[start + 1 :].lstrip(), True
    return text, False
