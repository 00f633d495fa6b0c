"""A failing input made as small as it can be while it fails in the same way."""

from __future__ import annotations

import time

from tests.fuzz.mutating import LARGEST, Pairs, Raw, dump, tree
from tests.fuzz.running import Failure, attempt
from tests.fuzz.target import Target

SECONDS = 20.0  # that one failure may take


def minimise(target: Target, failure: Failure) -> Failure:
    """A smaller input with the same signature: parts of trees first, then parts of bytes."""
    deadline = time.monotonic() + SECONDS
    best = failure

    def fails(data: bytes) -> bool:
        nonlocal best
        if len(data) >= len(best.data) or time.monotonic() > deadline:
            return False
        result = attempt(target, data)
        if isinstance(result, Failure) and result.signature == failure.signature:
            best = result
            return True
        return False

    if target.kind in ("json", "jsonl") and len(best.data) <= LARGEST:
        while any(fails(data) for data in _smaller_trees(best.data)):
            pass
    step = max(1, len(best.data) // 2)
    while step and time.monotonic() < deadline:
        at = 0
        while at < len(best.data):
            if not fails(best.data[:at] + best.data[at + step :]):
                at += step
        step //= 2
    return best


def _smaller_trees(data: bytes):
    """The same JSON with one value left out or made plain."""
    try:
        found = tree(data)
        if isinstance(found, list):
            for each in _without_one(found):
                yield dump(each).encode("utf-8", "surrogatepass")
    except RecursionError:
        return


def _without_one(node):
    if not isinstance(node, list):
        if isinstance(node, str) and not isinstance(node, Raw) and len(node) > 1:
            yield node[: len(node) // 2]
            yield node[len(node) // 2 :]
        return
    for at in range(len(node)):
        rest = type(node)(node)
        del rest[at]
        yield rest
    for at, each in enumerate(node):
        name, value = each if isinstance(node, Pairs) else (None, each)
        for smaller in _without_one(value):
            new = type(node)(node)
            new[at] = (name, smaller) if isinstance(node, Pairs) else smaller
            yield new
