"""What an endpoint's answers leave on disk: the cache of answers and the count of tokens."""

from __future__ import annotations

from unittest import mock

from groundkern.trainer.prepare import chat
from groundkern.trainer.prepare.chat import USAGE, ChatSettings, ask, usage_so_far
from tests.fuzz.scratch import folder, written
from tests.fuzz.target import Target, expect

FRESH = "asked again"
MESSAGES = [{"role": "user", "content": "?"}]


def check_answer(data: bytes) -> bool:
    """A cached answer is used as it is, or the endpoint is asked again; then it is cached."""
    settings = ChatSettings("model", folder() / "cache")
    path = chat.answer_path(settings, MESSAGES)
    written(str(path.relative_to(folder())), data)
    with mock.patch.object(chat, "_complete", return_value=(FRESH, {"requests": 1})):
        answer = ask(settings, MESSAGES)
    expect(isinstance(answer, str) and bool(answer), "a text", answer)
    with mock.patch.object(chat, "_complete", return_value=(None, {})):
        again = ask(settings, MESSAGES)
    expect(again == answer, "the same answer from the cache", again, answer)
    return answer != FRESH


def check_usage(data: bytes) -> bool:
    """Whole lines are counted; a line that was cut off is not, and nothing is lost behind it."""
    path = written(f"usage/{USAGE}", b'{"requests": 1}\n' + data + b'\n{"requests": 2}\n')
    found = usage_so_far(path.parent)
    expect(set(found) == {"requests", "prompt_tokens", "completion_tokens"}, "the counts", found)
    expect(all(type(n) is int and n >= 0 for n in found.values()), "whole numbers", found)
    expect(found["requests"] >= 3, "the lines around it", found)
    return found["requests"] > 3


ANSWERS = {
    "whole": b'{"answer": "<MARK 1>Coal</MARK>", "usage": {"requests": 1, "prompt_tokens": 7}}',
    "cut": b'{"answer": "<MARK 1>Co',
}
LINES = {
    "two": b'{"requests": 1, "prompt_tokens": 70, "completion_tokens": 9}\n{"requests": 1}',
}
TARGETS = (
    Target("cached_answer", check_answer, ANSWERS, "json", ("answer",), 1),
    Target("usage", check_usage, LINES, "jsonl", ("requests", "prompt_tokens"), 2),
)
