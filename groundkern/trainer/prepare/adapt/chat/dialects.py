"""The dialects: which fields tell each, and how it is read into turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.prepare.adapt.chat.turns import Turn, message_turn, turn_of
from groundkern.trainer.prepare.pipeline import LeftOut
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.wording import short

REJECTED = ("rejected", "rejected_messages", "rejected_response", "rejected_images")
CHOSEN = ("chosen", "chosen_messages")
VERDICTS = ("label", "kto_tag")


@dataclass(frozen=True)
class Dialect:
    """A shape of records.

    Args:
        title: what people call it.
        needs: fields that a record of it has, with a value.
        read: a record and what starts error messages, to turns.
        also: further fields that it reads.
    """

    title: str
    needs: tuple[str, ...]
    read: Callable[[dict[str, Any], str], list[Turn]]
    also: tuple[str, ...] = ()


def dialect_of(record: Any) -> Dialect | None:
    """The dialect of a record with an answer; None for anything else."""
    if not isinstance(record, dict):
        return None
    there = (d for d in DIALECTS if all(record.get(name) is not None for name in d.needs))
    return next(there, None)


def is_preference(record: Any) -> bool:
    """Whether a record compares answers or judges one."""
    if not isinstance(record, dict):
        return False
    compares = any(record.get(name) is not None for name in (*CHOSEN, *REJECTED))
    judged = any(isinstance(record.get(name), bool) for name in VERDICTS)
    return compares or (judged and dialect_of(record) is not None)


def chosen(record: dict[str, Any], where: str, *, take: bool) -> dict[str, Any]:
    """A record with the better answer alone; one that compares nothing stays as it is.

    Args:
        record: of any kind.
        where: what starts an error message.
        take: what the user asked for.

    Raises:
        LeftOut: it compares answers, and nobody asked for the better one; a bad answer.
    """
    if not is_preference(record):
        return record
    if not take:
        raise LeftOut(f"{where}: expected one answer, got a preference (see --take-chosen)")
    if any(record.get(name) is False for name in VERDICTS):
        raise LeftOut(f"{where}: expected an answer to learn, got one that is judged bad")
    made = {k: v for k, v in record.items() if k not in (*CHOSEN, *REJECTED, *VERDICTS)}
    if record.get("chosen_messages") is not None:
        return {**made, "messages": record["chosen_messages"]}
    better = record.get("chosen")
    if better is None:
        return made
    if "instruction" in record:
        return {**made, "output": better}
    if isinstance(record.get("conversations"), list):
        return {**made, "conversations": [*record["conversations"], better]}
    if "prompt" in record and not _whole(better):
        return {**made, "completion": better}
    return {**{k: v for k, v in made.items() if k != "prompt"}, "messages": better}


def _whole(better: Any) -> bool:
    """Whether a chosen answer is the whole conversation, question included."""
    first = better[0] if isinstance(better, list) and better else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _messages(record: dict[str, Any], where: str) -> list[Turn]:
    names = ("messages", "conversations", "conversation")
    name = next(n for n in names if record.get(n) is not None)
    return _listed(record[name], where, name)


def _listed(found: Any, where: str, name: str) -> list[Turn]:
    """The turns of a list of messages, or of pairs {"human", "assistant"}."""
    if isinstance(found, str):  # a column of a table that holds JSON
        try:
            found = plain_json(found)
        except ValueError as error:
            raise SampleError(f"{where}: `{name}`: {error}") from None
    if isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
        columns = zip(*found.values())  # how `datasets` keeps a list of objects
        found = [dict(zip(found, values)) for values in columns]
    if not isinstance(found, list):
        raise wrong(where, name, "a list of messages", short(found))
    turns = []
    for i, message in enumerate(found):
        there = f"{where}: {name}[{i}]"
        if isinstance(message, dict) and {"human", "assistant"} <= message.keys():
            turns.append(turn_of("user", message["human"], f"{there}.human"))
            turns.append(turn_of("assistant", message["assistant"], f"{there}.assistant"))
        else:
            turns.append(message_turn(message, there))
    return turns


def _completion(record: dict[str, Any], where: str) -> list[Turn]:
    """TRL's prompt and completion, each a text or a list of messages; the completion is trained."""
    turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        found = record[name]
        if isinstance(found, str):
            turns.append(turn_of(role, found, f"{where}: {name}"))
        else:
            turns += _listed(found, where, name)
        if name == "prompt":
            turns = [replace(turn, train=turn.role != "assistant") for turn in turns]
    return turns


def _pair(question: str, answer: str) -> Callable[[dict[str, Any], str], list[Turn]]:
    """A reader of a question and an answer under these names, after a `history` of pairs."""

    def read(record: dict[str, Any], where: str) -> list[Turn]:
        turns = []
        history = record.get("history") or []
        if not isinstance(history, list):
            raise wrong(where, "history", "a list of pairs", short(history))
        for i, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise wrong(where, f"history[{i}]", "a question and an answer", short(pair))
            turns.append(turn_of("user", pair[0], f"{where}: history[{i}][0]"))
            turns.append(turn_of("assistant", pair[1], f"{where}: history[{i}][1]"))
        asked = record[question]
        if question == "instruction" and isinstance(more := record.get("input"), str) and more:
            asked = f"{asked}\n{more}" if asked else more
        turns.append(turn_of("user", asked, f"{where}: {question}"))
        return [*turns, turn_of("assistant", record[answer], f"{where}: {answer}")]

    return read


DIALECTS = (
    Dialect("messages with role and content", ("messages",), _messages),
    Dialect("conversations with from and value", ("conversations",), _messages),
    Dialect("conversation", ("conversation",), _messages),
    Dialect("prompt and completion", ("prompt", "completion"), _completion),
    Dialect(
        "query and response", ("query", "response"), _pair("query", "response"), also=("history",)
    ),
    Dialect(
        "instruction and output",
        ("instruction", "output"),
        _pair("instruction", "output"),
        also=("input", "history"),
    ),
    Dialect("question and answer", ("question", "answer"), _pair("question", "answer")),
)
