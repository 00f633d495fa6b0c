"""A canonical record (docs/data/data-format.md) as the demo and the prepare commands write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from groundkern.trainer.data.finding import occurrences


def span_of(answer: str, start: int, stop: int) -> dict[str, Any]:
    """The fields of a record that name characters of an answer: by its text, where that can.

    A text that ends before its last accent cannot; it is named by its characters.
    """
    found = occurrences(answer[start:stop], answer)
    if (start, stop) not in found:
        return {"char_span": [start, stop]}
    number = found.index((start, stop))
    return {"text": answer[start:stop], **({"occurrence": number} if number else {})}


def chat_sample(
    images: Sequence[str],
    question: str,
    answer: str,
    *,
    task: str | None = None,
    **supervision: Any,
) -> dict[str, Any]:
    """A record with one question about its images, and the answer.

    Args:
        images: paths relative to the data root, shown before the question in this order; empty if
            there is one image whose path is set later.
        question, answer: texts.
        task: the record's label; None leaves it out.
        **supervision: further fields: `regions`, `words`, `phrases`.
    """
    asked = [*({"type": "image"} for _ in images or "?"), {"type": "text", "text": question}]
    return {
        **({} if task is None else {"task": task}),
        "images": list(images),
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ],
        **supervision,
    }
