"""SQuAD 1.1 and 2.0: questions about a passage, as text (`prepare render` draws it as pages).

A sample has the question's id, and as `meta` where in the passage the answer begins.

On disk: `{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text", "answer_start"}], "is_impossible"}]}]}]}`, or Hugging Face rows of `context`, `question`
and `answers {"text": [...], "answer_start": [...]}`. `answer_start` counts characters of the
context.

Source: rajpurkar.github.io/SQuAD-explorer; arXiv 1606.05250, 1806.03822.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.data.images import wrong
from groundkern.trainer.prepare.adapt.common import Options, other_answers, tables
from groundkern.trainer.prepare.pipeline import LeftOut, Made
from groundkern.trainer.prepare.placing import field_of
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed, members

PHRASING = None


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The questions of a file, each with its passage."""
    if (rows := tables(options)) is not None:
        return rows, None

    def read() -> Iterator[tuple[str, Any]]:
        for i, article in enumerate(json_array(options.data, "data")):
            yield from _questions(article, f"{options.data.name}[{i}]")

    return listed(read, [options.data]), None


def _questions(article: Any, where: str) -> Iterator[tuple[str, Any]]:
    for inside, paragraph in members(article, "paragraphs", "a list of an article", where):
        if isinstance(paragraph, Unusable):
            yield inside, paragraph
            continue
        for there, question in members(paragraph, "qas", "a list of questions", inside):
            if isinstance(question, dict):
                yield there, {"context": paragraph.get("context"), **question}
            elif isinstance(question, Unusable):
                yield there, question
            else:
                yield there, Unusable(question, "expected an object, got none")


def convert(item: Item, options: Options) -> Made:
    """One question with its passage before it, the first answer, and the others."""
    context = field_of(item.value, "context", str, item.where)
    question = field_of(item.value, "question", str, item.where)
    found = item.value.get("answers")
    if isinstance(found, dict):  # columns, as Hugging Face has them
        texts, starts = (found.get(name) for name in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise wrong(item.where, "answers", "texts and as many starts", repr(found)[:80])
        found = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    if not isinstance(found, list):
        raise wrong(item.where, "answers", "a list", repr(found)[:80])
    kept: dict[str, Any] = {}
    if isinstance(name := item.value.get("id"), str):
        kept["id"] = name
    if found:
        answer = field_of(found[0], "text", str, f"{item.where}.answers[0]")
        start = field_of(found[0], "answer_start", int, f"{item.where}.answers[0]")
        there = context[start : start + len(answer)] if start >= 0 else ""
        if there != answer:
            wanted = f"{answer!r} at character {start} of the context"
            got = repr(there) + _counted(context, answer, start)
            raise wrong(item.where, "answers[0].answer_start", wanted, got)
        kept["meta"] = {"answer_start": start}
    elif options.unanswerable is None:
        raise LeftOut(f"{item.where}: expected an answer, got a question without one")
    else:
        answer = options.unanswerable
    parts = [{"type": "text", "text": context}, {"type": "text", "text": f"\n\n{question}"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    sample = {**kept, "task": "squad", "messages": messages}
    others = (each.get("text") for each in found if isinstance(each, dict))
    return Made([other_answers(sample, others)])


def _counted(context: str, answer: str, start: int) -> str:
    """What else a file may have counted, if the answer is there by that."""
    for name, code, size in (("bytes of UTF-8", "utf-8", 1), ("units of UTF-16", "utf-16-le", 2)):
        text = context.encode(code, "surrogatepass")
        if start >= 0 and text.startswith(answer.encode(code, "surrogatepass"), start * size):
            return f" (it is there by {name}: count characters)"
    return ""
