"""Chosen heads on disk: `groundkern heads` writes them, `objectives.klal.chosen_heads` names
them. JSON, data only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KIND, VERSION = "heads of groundkern", 1
MOST_BYTES = 2**26  # of a file
Pairs = tuple[tuple[int, int], ...]


def header() -> dict[str, Any]:
    """What such a file starts with."""
    return {"kind": KIND, "version": VERSION}


def read_heads(path: Path) -> Pairs:
    """The (layer, head) pairs of a file, the best first.

    Args:
        path: of a file that `groundkern heads` wrote.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        found = json.loads(content) if len(content) <= MOST_BYTES else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"expected a file of `groundkern heads`, got {path}")
    if found.get("version") != VERSION:
        got = found.get("version")
        raise ValueError(f"{path}: expected version {VERSION} of its format, got {got!r:.20}")
    pairs = found.get("heads")
    if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
        raise ValueError(f"{path}: expected `heads`, pairs of a layer and a head, got none")
    return tuple((layer, head) for layer, head in pairs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
