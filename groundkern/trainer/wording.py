"""Values in messages, cut to a length that a person reads."""

from __future__ import annotations

MESSAGE = 1000  # characters of an error
VALUE = 80  # characters of a value within one


def short(value: object, limit: int = VALUE) -> str:
    """`repr` of a value, cut.

    Args:
        value: anything that a file may hold.
        limit: characters at most.
    """
    try:
        text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of over 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return cut(text, limit)


def cut(text: str, limit: int = MESSAGE) -> str:
    """A text on one line, with its end left out if it is longer than `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    text = "".join(map(_visible, text))  # escapes are longer
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _visible(character: str) -> str:
    if character in "\n\r\t":
        return " "
    return character if character.isprintable() else ascii(character)[1:-1]
