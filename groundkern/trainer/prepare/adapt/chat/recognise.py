"""What a file of records is: a chat of some dialect, a canonical file, preferences, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from groundkern.trainer.prepare.adapt.chat.dialects import DIALECTS, dialect_of, is_preference
from groundkern.trainer.prepare.adapt.chat.turns import FLAGS, REFUSED
from groundkern.trainer.wording import cut, short

Kind = Literal["canonical", "chat", "preference", "other"]
SUPERVISION = ("regions", "words", "phrases", "grounding_weight", "metrics")
"""What only the canonical format has."""
_OWN_FIELDS = ("image", "image_path", "objects", "system", "system_prompt", "mask_history")
_OWN_FLAGS = tuple(flag for flag in FLAGS if flag != "train")


def kind_of(records: Sequence[Any]) -> Kind:
    """What the first records of a file say that it is.

    One record with supervision of docs/data/data-format.md makes the file canonical, whatever is
    wrong with the others, and records that both formats share say nothing. Then one of another
    dialect is enough.

    Args:
        records: plain values; what could not be read is left out.
    """
    objects = [record for record in records if isinstance(record, dict)]
    plain = [record for record in objects if "messages" in record]
    if any(name in record for record in plain for name in SUPERVISION):
        return "canonical"
    if any(map(is_preference, objects)):
        return "preference"
    if any(map(_is_foreign, objects)):
        return "chat"
    return "canonical" if plain else "other"


def is_canonical(records: Sequence[Any]) -> bool:
    """Whether JSON lines are taken as they are: so are those of no known dialect, whose errors then
    say what docs/data/data-format.md wants.

    Args:
        records: see `kind_of`.
    """
    return kind_of(records) in ("canonical", "other")


def titles(records: Sequence[Any]) -> list[str]:
    """The dialects of records, each once, in the order in which they come."""
    found = (dialect_of(record) for record in records)
    return list(dict.fromkeys(dialect.title for dialect in found if dialect is not None))


def looks_like(records: Sequence[Any], problem: str | None = None) -> str:
    """One sentence on records that are of no dialect.

    Args:
        records: the first of a file.
        problem: of its first record, if none can be read.
    """
    wanted = "expected one of: " + "; ".join(dialect.title for dialect in DIALECTS)
    if not records:
        said = f" (the first: {problem})" if problem else ""
        return f"no record that can be read{said}; {wanted}"
    first = next((record for record in records if isinstance(record, dict)), None)
    if first is None:
        return f"a list of values such as {short(records[0])}; {wanted}"
    return f"a list of objects with {fields_of(first)}; {wanted}"


def fields_of(record: dict[str, Any]) -> str:
    """The names of a record's fields that have a value, the first few."""
    names = [cut(str(name), 40) for name, value in record.items() if value is not None]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no fields"


def _is_foreign(record: dict[str, Any]) -> bool:
    """Whether a record is of a dialect and not what docs/data/data-format.md calls a sample too."""
    dialect = dialect_of(record)
    if dialect is None:
        return False
    messages = record["messages"] if dialect.needs == ("messages",) else None
    if not isinstance(messages, list):
        return True
    if any(record.get(name) is not None for name in _OWN_FIELDS):
        return True
    images = record.get("images")
    if isinstance(images, list) and any(map(_foreign_image, images)):
        return True
    return any(map(_foreign_message, messages))


def _foreign_image(image: Any) -> bool:
    return not isinstance(image, str) or image.startswith(("/", "data:", "file:", "http"))


def _foreign_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    if any(message.get(name) is not None for name in ("from", *_OWN_FLAGS, *REFUSED)):
        return True
    content = message.get("content")
    if isinstance(content, list):
        return any(map(_foreign_part, content))
    return content is None or (isinstance(content, str) and "<image>" in content)


def _foreign_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return isinstance(part, str)
    kinds = ("image", "video", "text")
    return part.get("type") not in kinds or not part.keys() <= {"type", "text"}
