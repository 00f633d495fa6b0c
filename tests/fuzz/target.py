"""What a fuzz target is, and what every error must be like: one bounded sentence on one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError

LONGEST = 1000  # characters of a message
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # what str.splitlines() cuts at
DOCUMENTED = (SampleError, ConfigError)


class Wrong(AssertionError):
    """A property does not hold: a wrong result, where an error would have been found by itself."""


@dataclass(frozen=True)
class Target:
    """Something that parses.

    Args:
        name: as on the command line, and the folder of its corpus.
        check: parses bytes and checks what came out. True: they were taken; False: they were
            refused with a documented error. Raises whatever else happens, `Wrong` included.
        seeds: valid inputs, by what they are called; mutations start from them.
        kind: how inputs are mutated: "json", "jsonl", "yaml", "text" or "bytes".
        pieces: what else is spliced into texts.
        share: of all inputs, relative to the other targets.
        documented: the errors it may raise; their messages are checked.
    """

    name: str
    check: Callable[[bytes], bool]
    seeds: dict[str, bytes]
    kind: str
    pieces: Sequence[str] = ()
    share: float = 1.0
    documented: tuple[type[BaseException], ...] = DOCUMENTED

    def run(self, data: bytes) -> bool:
        """`check`, with a documented error counted as a refusal once its message is one."""
        try:
            return self.check(data)
        except self.documented as error:
            sentence(str(error))
            return False


def sentence(message: str) -> None:
    """Raises `Wrong` unless a message is fit to be shown."""
    if len(message) > LONGEST:
        raise Wrong(f"a message of {len(message)} characters: {message[:80]!r}...")
    ends = sorted({character for character in message if character in LINE_ENDS})
    if ends:
        raise Wrong(f"a message with line breaks {ends}: {message[:200]!r}")
    if not message.strip():
        raise Wrong("an error without a message")
    try:
        message.encode()
    except UnicodeEncodeError:
        raise Wrong(f"a message that cannot be printed: {message[:200]!r}") from None


def json_object(data: bytes) -> dict:
    """The JSON object in an input; an empty one if it holds something else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def expect(holds: bool, what: str, *got: object) -> None:
    """Raises `Wrong` with what was expected and what came, unless it holds."""
    if not holds:
        raise Wrong(f"expected {what}, got {', '.join(repr(each)[:300] for each in got)}")
