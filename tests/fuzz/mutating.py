"""Inputs made of valid ones: trees, texts and bytes changed where parsers stumble.

Everything is drawn from one `random.Random`, so that a seed and a number name an input.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tests.fuzz.target import Target

LARGEST = 1 << 16  # bytes of an input

TEXTS = (
    *("", " ", "\0", "\ufeff", "\x1c", "\x85", "\u2028", "\u2029", "\r", "\n", "\r\n", "\t"),
    *("e\u0301", "\u00e9", "\ufb01", "\u2026", "\u0130", "\u00df", "\u1e9e", "\u00bd", "\uff11"),
    *("\u202e", "\u2067", "\u200b", "\u200d", "\u00ad", "\U0001f468\u200d\U0001f469", "\U00020000"),
    *("\u0645\u0631\u062d\u0628\u0627", "\uac00", "\u1100\u1161", "\u0e01\u0e33", "\u0660\u0663"),
    *("..", "../a.png", "/etc/passwd", "a.png/", "~", "%s", "{0}", "{", "}}", "\\", '"', "'"),
    *("null", "NaN", "1e999", "-0", "1_000", "0x10", "true", "1,234", "5 %", "$5", "\ud800"),
    *("<image>", "<|im_end|>", "<|image_pad|>", "</s>", "<MARK 1>", "</MARK>", "[/EN#1/a b]"),
)
NUMBERS = ("0", "-0.0", "-1", "1", "2", "0.5", "1e-7", "1e-320", "1e15", "1e16", "1e308", "1e999")
NUMBERS += ("-1e999", "NaN", "Infinity", "-Infinity", "4294967296", "9223372036854775808")
NUMBERS += ("9" * 400, "9" * 5000, "1" + "0" * 330, "1.0", "999", "1000", "1001", "0.9999999")


class Raw(str):
    """JSON text that stands in a tree as it is."""


class Pairs(list):
    """An object as (name, value) pairs: a name may come twice."""


def mutate(rng: random.Random, target: Target) -> bytes:
    """One input for a target."""
    return mutate_from(rng, target, rng.choice(seeds_of(target)))


def seeds_of(target: Target) -> list[bytes]:
    """The target's valid inputs."""
    return list(target.seeds.values())


def mutate_from(rng: random.Random, target: Target, data: bytes) -> bytes:
    """An input made of another one."""
    seeds = seeds_of(target)
    for _ in range(1 + min(int(rng.expovariate(0.7)), 8)):
        draw = rng.random()
        if draw < 0.06:
            data = _bytes(rng, data, rng.choice(seeds))
        elif target.kind == "json":
            data = _json(rng, data, rng.choice(seeds), target.pieces)
        elif target.kind == "jsonl":
            data = _lines(rng, data, rng.choice(seeds), target.pieces)
        elif target.kind == "bytes":
            data = _bytes(rng, data, rng.choice(seeds))
        else:
            data = _text(rng, data, rng.choice(seeds), target.pieces)
        data = data[:LARGEST]
    return data


def _bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    to = min(to, at + int(2 ** rng.uniform(0, 10)))
    match rng.randrange(8):
        case 0 if data:
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + rng.choice((b"\0", b"\xff", b"\x80", b"\xed\xa0\x80")) + data[to:]
        case 2:
            return data[:at] + data[to:]
        case 3:
            return data[:to] + data[at:]
        case 4:
            return data[: rng.randint(0, len(data))]
        case 5:
            start = rng.randint(0, len(other))
            return data[:at] + other[start : start + to - at + 4] + data[to:]
        case 6:
            return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[to:]
    return b"".join(rng.choice((data, b"\xef\xbb\xbf", other)) for _ in range(2))


def _text(rng: random.Random, data: bytes, other: bytes, pieces: Sequence[str]) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    return change_text(rng, text, other.decode("utf-8", "replace"), pieces).encode(
        "utf-8", "surrogatepass" if rng.random() < 0.5 else "replace"
    )


def change_text(rng: random.Random, text: str, other: str, pieces: Sequence[str] = ()) -> str:
    """A text changed in one place, or normalised, or repeated."""
    at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    to = min(to, at + int(2 ** rng.uniform(0, 6)))
    piece = rng.choice((*pieces, *TEXTS)) if rng.random() < 0.8 else _odd(rng)
    match rng.randrange(10):
        case 0 | 1 | 2:
            return text[:at] + piece + text[at:]
        case 3:
            return text[:at] + piece + text[to:]
        case 4:
            return text[:at] + text[to:]
        case 5:
            return text[:to] + text[at:]
        case 6:
            start = rng.randint(0, len(other))
            return text[:at] + other[start : start + to - at + 1] + text[to:]
        case 7:
            return unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKC", "NFKD")), text)
        case 8:
            return rng.choice((str.upper, str.lower, str.title, str.strip))(text)
    return text[:at] + text[at:to] * rng.choice((2, 3, 50)) + text[to:]


def _odd(rng: random.Random) -> str:
    top = rng.choice((0x80, 0x300, 0x3000, 0x10000, 0x110000))
    return "".join(chr(rng.randrange(top)) for _ in range(rng.randint(1, 3)))


def _lines(rng: random.Random, data: bytes, other: bytes, pieces: Sequence[str]) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(at, rng.choice(other.split(b"\n")))
        case 1:
            lines.insert(at, rng.choice((b"", b" ", b"\r", b"\x0c", b"[]", b"7", b"null")))
        case _:
            lines[at] = _json(rng, lines[at], rng.choice(other.split(b"\n")), pieces)
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


@cache
def tree(data: bytes) -> Any:
    try:
        return json.loads(data, object_pairs_hook=Pairs, parse_constant=Raw, parse_int=_whole)
    except (ValueError, RecursionError):
        return None


def _whole(digits: str) -> Any:
    return int(digits) if len(digits) < 17 else Raw(digits)


def _json(rng: random.Random, data: bytes, other: bytes, pieces: Sequence[str]) -> bytes:
    found = tree(data)
    if not isinstance(found, list) or len(data) > LARGEST // 2:
        return _text(rng, data, other, pieces)
    donor = tree(other)
    changed = _at_random(rng, found, lambda node: _change(rng, node, donor, pieces))
    try:
        text = dump(changed, rng.random() < 0.3)
    except RecursionError:
        return data
    if rng.random() < 0.02:
        text = rng.choice(("\ufeff", " ", "\n", "[", "")) + text + rng.choice(("", "]", "x", "\0"))
    return text.encode("utf-8", "surrogatepass")


def _at_random(rng: random.Random, node: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with one of its nodes changed; those near the root are chosen less often."""
    if not isinstance(node, list) or not node or rng.random() < 0.12:
        return change(node)
    at = rng.randrange(len(node))
    new = type(node)(node)
    if isinstance(node, Pairs):
        name, value = node[at]
        new[at] = (name, _at_random(rng, value, change))
    else:
        new[at] = _at_random(rng, node[at], change)
    return new


def _change(rng: random.Random, node: Any, donor: Any, pieces: Sequence[str]) -> Any:
    if rng.random() < 0.2:
        return _value(rng, donor, pieces)
    if isinstance(node, Pairs):
        return _change_pairs(rng, node, donor, pieces)
    if isinstance(node, list):
        return _change_list(rng, node, donor, pieces)
    if isinstance(node, str) and not isinstance(node, Raw):
        return change_text(rng, node, rng.choice((*pieces, *TEXTS)), pieces)
    if isinstance(node, int | float) and not isinstance(node, bool):
        match rng.randrange(6):
            case 0:
                return Raw(rng.choice(NUMBERS))
            case 1:
                return node + rng.choice((-1, 1, 0.5, 1e-7))
            case 2:
                return node * rng.choice((-1, 10, 1000, 0.001))
            case 3:
                return str(node)
            case 4:
                return float(node)
        return [node]
    return _value(rng, donor, pieces)


def _change_pairs(rng: random.Random, node: Pairs, donor: Any, pieces: Sequence[str]) -> Any:
    new = Pairs(node)
    if not new:
        return Pairs([(rng.choice(TEXTS), _value(rng, donor, pieces))])
    at = rng.randrange(len(new))
    name, value = new[at]
    match rng.randrange(7):
        case 0:
            del new[at]
        case 1:
            new.insert(rng.randint(0, len(new)), (name, value))
        case 2:
            new.insert(rng.randint(0, len(new)), (name, _value(rng, donor, pieces)))
        case 3:
            new[at] = (change_text(rng, name, name, pieces), value)
        case 4:
            rng.shuffle(new)
        case 5:
            new.append((rng.choice((*pieces, *TEXTS)), _value(rng, donor, pieces)))
        case 6:
            other = rng.randrange(len(new))
            new[at], new[other] = (name, new[other][1]), (new[other][0], value)
    return new


def _change_list(rng: random.Random, node: list, donor: Any, pieces: Sequence[str]) -> Any:
    new = list(node)
    at = rng.randint(0, len(new))
    match rng.randrange(6):
        case 0:
            new.insert(at, _value(rng, donor, pieces))
        case 1 if new:
            del new[at % len(new)]
        case 2 if new:
            new.insert(at, rng.choice(new))
        case 3:
            rng.shuffle(new)
        case 4:
            new *= rng.choice((2, 3, 20))
        case _:
            new = [new] if rng.random() < 0.5 else new[:at]
    return new


def _value(rng: random.Random, donor: Any, pieces: Sequence[str]) -> Any:
    match rng.randrange(12):
        case 0:
            return rng.choice((None, True, False, [], Pairs(), [[]], Raw("")))
        case 1 | 2:
            return Raw(rng.choice(NUMBERS))
        case 3 | 4 | 5:
            return rng.choice((*pieces, *TEXTS))
        case 6:
            depth = rng.choice((5, 100, 2000, 20000))
            return Raw(rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth)))
        case 7:
            return rng.choice((*pieces, *TEXTS)) * rng.choice((2, 100, 2000))
    found = donor
    while isinstance(found, list) and found and rng.random() < 0.8:
        found = rng.choice(found)
        found = found[1] if isinstance(found, tuple) else found
    return found


def dump(node: Any, ascii_only: bool = False) -> str:
    """A tree as JSON text, raw parts as they are."""
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        names = (json.dumps(name, ensure_ascii=ascii_only) for name, _ in node)
        values = (dump(value, ascii_only) for _, value in node)
        return "{" + ", ".join(map(": ".join, zip(names, values))) + "}"
    if isinstance(node, list | tuple):
        return "[" + ", ".join(dump(each, ascii_only) for each in node) + "]"
    return json.dumps(node, ensure_ascii=ascii_only)
