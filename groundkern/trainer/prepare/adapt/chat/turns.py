"""A conversation as every dialect is read: turns of text and slots for images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.wording import short

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function"), "tool"),
}
# which turns are trained: axolotl, OpenAI, LLaMA-Factory, verl, and ms-swift's two
FLAGS = ("train", "weight", "loss_weight", "loss_mask", "loss", "loss_scale")
REFUSED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
REFUSED += ("audio", "train_detail")
TEXTS = ("text", "input_text", "output_text", "tool_call")
IMAGES = ("image", "image_url", "input_image")
REFERENCES = ("image", "image_url", "url", "path", "value", "base64", "source", "bytes")

# A line break beside a placeholder belongs to it; `<img>` names its file, as Qwen-VL's data do.
_PLACEHOLDER = re.compile(r"\n?<image>\n?|<img>([^<>\n]+)</img>\n?")


@dataclass(frozen=True)
class Slot:
    """A place for an image: the one it refers to, or (None) the record's next one."""

    reference: Any = None


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        role: system, user, assistant or tool.
        pieces: texts and slots in their order.
        train: False for an answer that is context only.
        unread: how many of the message's fields say something that is not kept.
    """

    role: str
    pieces: tuple[str | Slot, ...]
    train: bool = True
    unread: int = 0


def split_text(text: str) -> Iterator[str | Slot]:
    """The texts between the placeholders `<image>` and `<img>FILE</img>`, and slots for these."""
    at = 0
    for found in _PLACEHOLDER.finditer(text):
        if text[at : found.start()]:
            yield text[at : found.start()]
        yield Slot(found[1])
        at = found.end()
    if text[at:]:
        yield text[at:]


def turn_of(role: str, content: Any, where: str, *, train: bool = True, unread: int = 0) -> Turn:
    """The turn of a message's content: a text or a list of parts.

    Args:
        role: of `ROLES`' values; an assistant's text is kept as it is, the others' may hold
            placeholders.
        content: of the message.
        where: what starts an error message.
        train, unread: see `Turn`.

    Raises:
        SampleError: nothing, as of a field that has another name; a part that is neither text nor
            image.
    """
    if content is None:
        raise SampleError(f"{where}: expected a text or a list of parts, got none")
    parts = content if isinstance(content, list) else [content]
    pieces: list[str | Slot] = []
    for i, part in enumerate(parts):
        there = f"{where}[{i}]" if isinstance(content, list) else where
        piece = part if isinstance(part, str) else _piece(part, there)
        pieces += split_text(piece) if isinstance(piece, str) and role != "assistant" else [piece]
    if role == "assistant" and all(isinstance(piece, str) for piece in pieces):
        pieces = ["".join(pieces)]
    return Turn(role, tuple(pieces), train, unread)


def _piece(part: Any, where: str) -> str | Slot:
    """The text or slot of one part; a field without a value is not there."""
    if not isinstance(part, dict):
        raise SampleError(f"{where}: expected a text or an object, got {short(part)}")
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type") or ("text" if "text" in part else "image" if part else None)
    if kind in TEXTS:
        text = part.get("text", part.get("value", part.get("content")))
        if not isinstance(text, str):
            raise wrong(where, "text", "a text", short(text))
        return text
    if kind in IMAGES:
        given = (part[name] for name in REFERENCES if name in part)
        return Slot(next(given, None))
    wanted = "text or image parts"
    raise wrong(where, "type", wanted, f"{short(kind)}, which is not supported")


def message_turn(message: Any, where: str) -> Turn:
    """The turn of a message with role and content, or from and value.

    Raises:
        SampleError: no message, an unknown role, or something that would be lost: structured tool
            calls, reasoning apart from the answer, a weight between 0 and 1.
    """
    if not isinstance(message, dict):
        raise SampleError(f"{where}: expected a message, got {short(message)}")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        field = "from" if "from" in message else "role"
        raise wrong(where, field, f"one of {', '.join(ROLES)}", short(said))
    for name in REFUSED:
        if message.get(name):
            raise wrong(where, name, "answers as text", "a field that no text stands for")
    field = "value" if "value" in message else "content"
    train = _trained(message, role, where)
    known = {"role", "from", "content", "value", *FLAGS}
    unread = sum(bool(value) for name, value in message.items() if name not in known)
    return turn_of(role, message.get(field), f"{where}.{field}", train=train, unread=unread)


def _trained(message: dict[str, Any], role: str, where: str) -> bool:
    """What the flags of a message and of its parts say."""
    parts = message.get("content", message.get("value"))
    holders = [message, *(p for p in parts if isinstance(p, dict))] if _list(parts) else [message]
    said: dict[bool, str] = {}
    for holder in holders:
        for name in FLAGS:
            value = holder.get(name)
            if value is None:
                continue
            if not isinstance(value, int | float) or value not in (0, 1):
                raise wrong(where, name, "0 or 1: a turn is trained or not", short(value))
            if value and role != "assistant":
                raise wrong(where, name, "only answers to train on", f"1 for a message of {role}")
            said[bool(value)] = name
    if len(said) > 1:
        names = " and ".join(dict.fromkeys(said.values()))
        raise wrong(where, names, "one answer on whether the turn is trained", "two")
    return said.keys() != {False} or role != "assistant"


def _list(value: Any) -> bool:
    return isinstance(value, list)
