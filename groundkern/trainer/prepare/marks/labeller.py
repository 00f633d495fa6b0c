"""Phrases of an answer linked to numbered text regions by a model, its reply parsed strictly.

As SMAM's data was made: the model repeats the answer with `<MARK ID>phrase</MARK>` around each
phrase whose text is printed in region ID (IDs with commas for several); without the marks the text
must be the answer, character by character.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image

from groundkern.trainer.prepare.chat import ChatSettings, ask
from groundkern.trainer.prepare.marks.drawing import data_url, draw_marks
from groundkern.trainer.prepare.marks.grouping import Line
from groundkern.trainer.prepare.marks.matching import Match, Place, PrintedText
from groundkern.trainer.prepare.marks.normalise import tokens

_MARK = re.compile(r"<MARK (?P<ids>\d+(?: ?, ?\d+)*)>|(?P<close></MARK>)")
_ALMOST = re.compile(r"<\s*/?\s*MARK", re.IGNORECASE)
_RULES = """\
You link phrases of an answer to the text regions of an image. Every region has a mask and a number.
Repeat the answer exactly, character by character, and put <MARK ID>phrase</MARK> around each phrase
that the answer takes from the image, where ID is the number of the region in which this text
stands. If the phrase runs over several regions, write their numbers with commas: <MARK 3, 4>. Mark
a phrase only where the region shows the same text and is the place that the answer speaks of. Marks
must not overlap. Mark nothing if nothing fits. Reply with the marked answer and nothing else."""


class BadMarks(ValueError):
    """A reply that is not the answer with valid marks; says what was wanted and what came."""


@dataclass(frozen=True)
class Mark:
    """Characters `start:stop` of the answer are linked to the regions `ids`."""

    start: int
    stop: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class LabellerSettings:
    """How the model is asked.

    Args:
        chat: see `ChatSettings`.
        attempts: how often it may reply; each time it is told what was wrong.
        alpha, max_side: of `draw_marks`.
        max_regions: of a sample; one with more regions is rejected.
        any_text: keep marks whose phrase is not printed in their regions.
    """

    chat: ChatSettings
    attempts: int = 2
    alpha: float = 0.35
    max_side: int = 1536
    max_regions: int = 200
    any_text: bool = False


def parse_marks(reply: str, answer: str, known: set[str]) -> list[Mark]:
    """The marks of a reply; white space around the whole reply is ignored.

    Args:
        reply: the model's text.
        answer: what it must be without its marks.
        known: the ids there are.

    Raises:
        BadMarks: another text, an unknown id, a mark that is nested, open, empty or malformed.
    """
    plain, marks, at = "", [], 0
    opened: tuple[int, tuple[str, ...]] | None = None
    reply, wanted = reply.strip(), answer.strip()
    for tag in _MARK.finditer(reply):
        plain += reply[at : tag.start()]
        at = tag.end()
        if tag["close"] is None:
            if opened is not None:
                raise BadMarks(f"expected </MARK> before the next mark, got {tag[0]}")
            ids = tuple(dict.fromkeys(re.split(r" ?, ?", tag["ids"])))
            unknown = [each for each in ids if each not in known]
            if unknown:
                raise BadMarks(f"expected ids of regions that are there, got {unknown[0][:20]}")
            opened = (len(plain), ids)
        elif opened is None:
            raise BadMarks("expected <MARK ID> before </MARK>, got none")
        else:
            if not plain[opened[0] :].strip():
                raise BadMarks("expected a phrase within each mark, got none")
            marks.append((opened[0], len(plain), opened[1]))
            opened = None
    plain += reply[at:]
    if opened is not None:
        raise BadMarks("expected </MARK> for every mark, got one that stays open")
    if plain != wanted:
        stray = _ALMOST.search(plain)
        if stray and not _ALMOST.search(wanted):
            got = plain[stray.start() : stray.start() + 20]
            raise BadMarks(f"expected marks written <MARK ID>phrase</MARK>, got {got!r}")
        raise BadMarks(
            f"expected the answer itself without the marks, got {_difference(plain, wanted)}"
        )
    shift = len(answer) - len(answer.lstrip())
    return [Mark(start + shift, stop + shift, ids) for start, stop, ids in marks]


def label(
    images: list[Image.Image],
    printed: PrintedText,
    question: str,
    answer: str,
    settings: LabellerSettings,
    counts: Counter[str],
) -> list[Match]:
    """What `PrintedText.matches` finds by text, found by the model.

    Args:
        images: RGB, of the sample.
        printed: their words.
        question, answer: texts; spans count the answer's characters.
        settings: see `LabellerSettings`.
        counts: `marks_dropped` goes up by each mark whose phrase is not printed in its regions.

    Raises:
        BadMarks: no valid reply in all attempts.
        trainer.prepare.chat.RefusedRequest: the endpoint cannot answer for this sample.
    """
    if _ALMOST.search(answer):
        raise BadMarks("expected an answer without <MARK, got one with it")
    lines = [line for line in printed.lines if tokens(line.text)]
    if len(lines) > settings.max_regions:
        wanted = f"at most {settings.max_regions} text regions to ask for (--max-regions)"
        raise BadMarks(f"expected {wanted}, got {len(lines)}")
    regions = {str(n + 1): line for n, line in enumerate(lines)}
    if not regions or not answer.strip():
        return []
    chat = request(images, regions, question, answer, settings)
    for attempt in range(settings.attempts):
        reply = ask(settings.chat, chat)
        try:
            marks = parse_marks(reply, answer, set(regions))
            break
        except BadMarks as error:
            if attempt + 1 == settings.attempts:
                raise
            chat = chat + [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": f"That does not fit: {error}. Reply again."},
            ]
    found = []
    for mark in marks:
        named = [regions[each] for each in mark.ids]
        if not settings.any_text and not _stands_in(answer[mark.start : mark.stop], named):
            counts["marks_dropped"] += 1
            continue
        places = tuple(Place(line.image, line.box) for line in named)
        found.append(Match(mark.start, mark.stop, places, False))
    return found


def request(
    images: list[Image.Image],
    regions: dict[str, Line],
    question: str,
    answer: str,
    settings: LabellerSettings,
) -> list[dict[str, Any]]:
    """The chat that asks for marks: rules, masked images, the list of regions, the answer."""
    parts: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        marks = {number: line.box for number, line in regions.items() if line.image == index}
        picture = draw_marks(image, marks, alpha=settings.alpha, max_side=settings.max_side)
        parts.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
    listed = "\n".join(f"{number}: {line.text}" for number, line in regions.items())
    text = f"Regions:\n{listed}\n\nQuestion: {question}\n\nAnswer to repeat with marks:\n{answer}"
    parts.append({"type": "text", "text": text})
    return [{"role": "system", "content": _RULES}, {"role": "user", "content": parts}]


def _stands_in(phrase: str, lines: list[Line]) -> bool:
    """Whether the phrase is the text of the lines together, or printed in each of them."""
    words = [word for line in lines for word in line.words]
    keys = {token.key for token in tokens(phrase)}
    shared = all(keys & {token.key for token in tokens(line.text)} for line in lines)
    return shared and PrintedText(words, scales="keep").holds(phrase)


def _difference(got: str, wanted: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted))
    )
    return f"{got[at : at + 30]!r} in place of {wanted[at : at + 30]!r} at character {at}"
