"""Faults: which kinds a call can meet, and what a faulty process answers to its calls."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from tests.faults.shim import GO, KILL_AFTER, KILL_BEFORE, KILL_INSIDE, SHORT, Call

KILLS = {"kill before": KILL_BEFORE, "kill inside": KILL_INSIDE, "kill after": KILL_AFTER}
ERRORS = ("ENOSPC", "EDQUOT", "EIO")
KINDS = (*KILLS, "short", *(f"{name} {often}" for name in ERRORS for often in ("once", "on")))
# What needs space, and so fails on a full disk.
_NEEDS_SPACE = ("write", "mkdir", "rename", "link", "symlink", "allocate", "copy", "fsync")


def kinds(call: Call) -> list[str]:
    """The faults that can happen at a call.

    Args:
        call: as it came to the hook, before it was made.
    """
    parts = call.op == "write" and call.size > 1
    found = [kind for kind in KILLS if kind != "kill inside" or parts]
    found += ["short"] if parts else []
    for name in ERRORS:
        if can_fail(call, name):
            found += [f"{name} once", f"{name} on"]
    return found


def can_fail(call: Call, name: str) -> bool:
    """Whether a call can fail with an error.

    Args:
        call: as it came to the hook, before it was made.
        name: the error; EIO can come from anything, the others from what needs space.
    """
    if call.op == "mkdir" and os.path.exists(call.path):
        return False  # is told that it exists
    if name == "EIO" or call.op in _NEEDS_SPACE:
        return True
    if call.op == "open":
        return bool(call.flags & os.O_CREAT) and not os.path.exists(call.path)
    if call.op == "truncate":
        size = os.path.getsize(call.path) if os.path.exists(call.path) else 0
        return call.size > size
    return call.op == "close" and name == "EDQUOT"  # NFS finds out when it closes


@dataclass
class Fault:
    """One fault: its first call meets it in any case, later ones if it lasts.

    Args:
        kind: one of `KINDS`.
        met: the first call has met it.
    """

    kind: str
    met: bool = False

    def answer(self, call: Call) -> int:
        """What the shim does with a call."""
        first, self.met = not self.met, True
        if self.kind in KILLS:
            return KILLS[self.kind]
        if self.kind == "short":
            return SHORT if first else GO
        name, often = self.kind.split()
        if first or (often == "on" and can_fail(call, name)):
            return getattr(errno, name)
        return GO
