"""Records that tests write and read."""

from __future__ import annotations

import json
from pathlib import Path


def sample(answer: str = "yes", image: str | None = "a.png", **more) -> dict:
    """A canonical sample."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return {"images": [image] if image else [], "messages": messages, **more}


def lines_of(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
