"""Where a text is in an answer: as it is written, or under another Unicode form of the same text.

"é" is one character or an "e" with a combining accent, depending on who wrote it; OCR writes "..."
where an answer has an ellipsis. What is found is always a stretch of the answer's own characters,
and never a part of one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

Span = tuple[int, int]
FORMS = ("NFD", "NFKD")  # canonical, then compatible (ligatures, full-width, ellipsis, no-break)
_SAME = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
}


def occurrences(text: str, answer: str) -> list[Span]:
    """The (start, stop) of every occurrence of a text, overlapping ones too, in their order.

    If the text is nowhere as it is written, occurrences that equal it canonically count (NFC, NFD),
    and if there is none either, compatible ones (NFKC). One that would cut a character from its
    accent, a ligature in two or a syllable from its last consonant is none.

    Args:
        text: what to find, not empty.
        answer: where.
    """
    found = _whole(_exact(text, answer), answer)
    for form in FORMS:
        if found or (text.isascii() and answer.isascii()):
            break
        found = _whole(_normalised(text, answer, form), answer)
    return found


def cuts(text: str, at: int) -> bool:
    """Whether position `at` is within a character: composing the text (NFC) would cross it."""
    if not 0 < at < len(text) or text[at].isascii():
        return False
    before, after = text[max(0, at - 8) : at], text[at]
    composed = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", after)
    return unicodedata.normalize("NFC", before + after) != composed


def difference(text: str, answer: str) -> str | None:
    """What keeps a text from being found, if it is there but for case, accents or signs.

    Args:
        text: what was not found.
        answer: where.

    Returns:
        For example "the message has U+2019 RIGHT SINGLE QUOTATION MARK where this has U+0027
        APOSTROPHE"; None if nothing alike is there.
    """
    (wanted, _), (folded, sources) = _folded(text), _folded(answer)
    at = folded.find(wanted) if wanted else -1
    if at < 0:
        return None
    behind = at + len(wanted)
    stop = sources[behind] if behind < len(sources) else len(answer)
    part = answer[sources[at] : max(stop, sources[behind - 1] + 1)]  # marks behind it too
    for theirs, ours in zip(part, text):
        if theirs != ours:
            return f"the message has {_named(theirs)} where this has {_named(ours)}"
    if len(part) > len(text):
        return f"the message goes on with {_named(part[len(text)])}"
    return f"this goes on with {_named(text[len(part)])}" if len(text) > len(part) else None


def _whole(spans: list[Span], answer: str) -> list[Span]:
    return [(start, stop) for start, stop in spans if not cuts(answer, start) | cuts(answer, stop)]


def _exact(text: str, answer: str) -> list[Span]:
    found, start = [], answer.find(text)
    while start >= 0:
        found.append((start, start + len(text)))
        start = answer.find(text, start + 1)
    return found


def _normalised(text: str, answer: str, form: str) -> list[Span]:
    """Occurrences in decomposed form that are whole characters of the answer."""
    wanted = unicodedata.normalize(form, text)
    decomposed, sources = _decomposed(answer, form)
    pieces = Counter(sources)  # how many characters each character of the answer became
    found = []
    for start, stop in _exact(wanted, decomposed):
        inside = Counter(sources[start:stop])
        span = min(inside), max(inside) + 1
        whole = all(inside[index] == pieces[index] for index in range(*span))
        if whole and not unicodedata.combining(answer[span[1] : span[1] + 1] or " "):
            found.append(span)
    return found


@lru_cache(maxsize=4)  # an answer's spans come one after another
def _decomposed(text: str, form: str) -> tuple[str, list[int]]:
    """The text in NFD or NFKD, and for each of its characters the one of `text` it comes from."""
    pairs: list[tuple[str, int]] = []
    run: list[tuple[str, int]] = []  # combining marks, which are put in the order of their classes
    for index, character in enumerate(text):
        for each in unicodedata.normalize(form, character):
            if unicodedata.combining(each):
                run.append((each, index))
                continue
            pairs += sorted(run, key=lambda pair: unicodedata.combining(pair[0]))
            run = []
            pairs.append((each, index))
    pairs += sorted(run, key=lambda pair: unicodedata.combining(pair[0]))
    return "".join(each for each, _ in pairs), [index for _, index in pairs]


def _folded(text: str) -> tuple[str, list[int]]:
    """The text without case, accents, format characters and kinds of quotes, dashes and spaces."""
    folded, sources = [], []
    for index, character in enumerate(text):
        for each in unicodedata.normalize("NFKD", _SAME.get(character, character)).casefold():
            if unicodedata.category(each) in ("Mn", "Cf", "Cc") and not each.isspace():
                continue
            folded.append(" " if each.isspace() else _SAME.get(each, each))
            sources.append(index)
    return "".join(folded), sources


def _named(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return f"{code} {unicodedata.name(character, '')}".rstrip()
