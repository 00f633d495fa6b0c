"""What `render` draws and asks: a text with a question and an answer, from a record or a sample.

A canonical sample without images (`prepare adapt squad` makes such) has its passage as the first
text parts of a user message and the question as the last one. The pages take the passage's place,
all else stays, and where the sample's `meta` says where in the passage the answer is
(`answer_start`, in characters), each of the answer's words becomes a region: its box on the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundkern.hf.data.example import message_text
from groundkern.trainer.data.images import wrong
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.sources import Item
from groundkern.trainer.records import chat_sample, span_of

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Word:
    """A word of the text on a page: its place in the text's characters, and its box."""

    start: int
    stop: int
    box: Box
    page: int


@dataclass(frozen=True)
class Passage:
    """A text to draw, and what is asked about it.

    Args:
        text: what is drawn.
        question: what is asked.
        answer: None: the text itself.
        sample: the canonical sample that it comes from, if any.
        turn: the message of the sample that has the text.
        start: where in the text the answer is, if that is known.
    """

    text: str
    question: str
    answer: str | None = None
    sample: dict[str, Any] | None = None
    turn: int = 0
    start: int | None = None

    def asked(
        self, names: Sequence[str], read: str, words: list[dict], placed: Sequence[Word]
    ) -> dict[str, Any]:
        """The sample about the pages.

        Args:
            names: paths of the pages.
            read: the answer, or the text on these pages.
            words: records of the words on them.
            placed: the same words in the text.
        """
        made = chat_sample(names, self.question, read, words=words)
        if self.sample is None:
            return made
        messages = [*self.sample["messages"]]
        messages[self.turn] = made["messages"][0]
        regions = self._regions(messages, placed, len(names))
        supervision = {"words": words, **({"regions": regions} if regions else {})}
        return {**self.sample, "images": list(names), "messages": messages, **supervision}

    def _regions(self, messages: list[dict], placed: Sequence[Word], pages: int) -> list[dict]:
        """A region for each word of the answer that is drawn whole."""
        if self.start is None:
            return []
        roles = [message["role"] for message in messages]
        turn = roles.index("assistant", self.turn)
        several = {"turn": turn} if roles.count("assistant") > 1 else {}
        start, stop, found = self.start, self.start + len(self.answer), []
        for word in placed:
            low, high = max(start, word.start) - start, min(stop, word.stop) - start
            if low < high:
                page = {"image": word.page} if pages > 1 else {}
                span = span_of(self.answer, low, high)
                found.append({**span, **several, **page, "box": list(word.box)})
        return found


def passage_of(item: Item) -> Passage:
    """The passage of a canonical sample.

    Raises:
        SampleError: no sample, one with images or videos, or none of a passage and a question.
    """
    record, where = item.value, item.where
    for kind in ("images", "videos"):
        if record.get(kind):
            raise wrong(where, kind, f"a sample without {kind}", repr(record[kind])[:80])
    sample = parse_sample(record, root=Path(), where=where)
    contents = [m["content"] if m["role"] == "user" else "" for m in record["messages"]]
    turns = [i for i, parts in enumerate(contents) if isinstance(parts, list) and len(parts) > 1]
    if not turns:
        wanted = "a user message of two texts, a passage and a question about it"
        raise wrong(where, "messages", wanted, "none")
    turn, content = turns[0], contents[turns[0]]
    *texts, question = (part.get("text", "") for part in content)
    text = "".join(texts)
    if not text.strip() or not question.strip():
        raise wrong(where, f"messages[{turn}].content", "a passage and a question", "an empty one")
    answers = [message_text(m) for m in sample.messages[turn:] if m["role"] == "assistant"]
    if not answers:
        raise wrong(where, "messages", "an answer behind the question", "none")
    answer = answers[0]
    start = _start(record.get("meta") or {}, text, answer, where)
    return Passage(text, question.strip(), answer, record, turn, start)


def _start(meta: dict[str, Any], text: str, answer: str, where: str) -> int | None:
    """`answer_start`, checked: None if there is none."""
    start = meta.get("answer_start")
    if start is None:
        return None
    there = text[start : start + len(answer)] if type(start) is int and start >= 0 else None
    if there != answer:
        wanted = f"{answer[:80]!r} at character {start} of the passage"
        raise wrong(where, "meta.answer_start", wanted, repr(there)[:90])
    return start


def stretches(text: str) -> list[tuple[int, int]]:
    """(start, stop) of what `str.split` makes of a text."""
    return [found.span() for found in re.finditer(r"\S+", text)]
