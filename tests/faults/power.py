"""Folders that a power failure may leave, worked out from the log of a run's calls.

POSIX promises only what was synced: the bytes of a file by fsync of it, its name by fsync of the
folder that holds the name. Until then each of these may or may not be on the disk:

- the bytes of a file: as written, or those of its last fsync, or those with the new length and
  zeros in place of the new bytes, or a part of the new ones;
- a created, renamed or removed name. A rename is one change: it never leaves both names or none.

`states` tries, after each call: no unsynced bytes; zeros for them; nothing unsynced at all; the
oldest part of the unsynced names; and a random choice for each. The same folder comes up after many
calls and is given once for each set of checkpoints that was complete.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import tree
from tests.faults.shim import Call

WRITTEN = "written"  # not a failure: the folder as the process sees it
KINDS = ("power: no bytes", "power: zeros", "power: nothing", "power: old names", "power: random")


@dataclass(frozen=True)
class Logged:
    """A call that was made, or (without one) a checkpoint that was complete.

    Args:
        call: the call.
        result: what it returned, or -errno.
        content: of the whole file, after a copy by the kernel.
        saved: the step of the checkpoint.
    """

    call: Call | None = None
    result: int = 0
    content: bytes | None = None
    saved: int = 0


def read_log(path: Path) -> Iterator[Logged]:
    """What the server's "log" mode wrote."""
    with path.open("rb") as file:
        while file.peek(1):
            what, *rest = pickle.load(file)
            yield Logged(*rest) if what == "call" else Logged(saved=rest[0])


@dataclass(eq=False)
class Node:
    """A file or a folder.

    Args:
        held: its bytes, or the nodes of its names.
        synced: the same as of the last fsync.
        versions: what of a file may be there after a power failure, once it was worked out.
    """

    held: bytes | dict[str, Node]
    synced: bytes | dict[str, Node]
    versions: tuple[bytes, ...] = ()

    @property
    def is_folder(self) -> bool:
        return isinstance(self.held, dict)


@dataclass(eq=False)
class Change:
    """An unsynced change of names: `node` appears in `to` and its old name goes.

    Args:
        old: (folder, name) that is given up.
        new: (folder, name) that is taken.
    """

    node: Node
    old: tuple[Node, str] | None = None
    new: tuple[Node, str] | None = None

    @property
    def settles(self) -> Node:
        """The folder whose fsync brings it to the disk."""
        return (self.new or self.old)[0]


@dataclass
class State:
    """A folder as it may be after a power failure.

    Args:
        number: of the last call before it.
        op, path: that call's.
        saved: the steps of the checkpoints that were complete.
        files: bytes by path, None for a folder.
    """

    number: int
    kind: str
    op: str
    path: str
    saved: list[int]
    files: dict[str, bytes | None] = field(repr=False)

    def write(self, root: Path) -> None:
        """Make a folder so."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, content in sorted(self.files.items()):
            if content is None:
                (root / name).mkdir()
            else:
                (root / name).write_bytes(content)


class Disk:
    """A folder in memory, with what of it is synced.

    Args:
        base: what was there before, all of it synced.
        root: the folder that the calls name.
    """

    def __init__(self, base: Path, root: Path):
        self.root = str(root)
        self.top = _read(base)
        self.changes: list[Change] = []

    def apply(self, logged: Logged) -> None:
        """Do what a call did."""
        call = logged.call
        if logged.result < 0:
            return
        folder, name = self._place(call.path)
        node = folder.held.get(name) if folder else self.top
        match call.op:
            case "open" if node is None:
                self._change(new=(folder, name), node=Node(b"", b""))
            case "open" if call.flags & os.O_TRUNC:
                node.held = b""
            case "mkdir":
                self._change(new=(folder, name), node=Node({}, {}))
            case "write":
                held = node.held.ljust(call.offset, b"\0")
                data = call.data[: logged.result]
                node.held = held[: call.offset] + data + held[call.offset + len(data) :]
            case "copy":
                node.held = logged.content
            case "truncate":
                node.held = node.held[: call.size].ljust(call.size, b"\0")
            case "fsync":
                self._sync(node)
            case "unlink" | "rmdir":
                self._change(old=(folder, name), node=node)
            case "rename":
                self._change(old=(folder, name), new=self._place(call.other), node=node)
            case "link":
                self._change(new=self._place(call.other), node=node)
            case "open" | "close":
                pass
            case other:
                raise NotImplementedError(f"{other} {call.path}")

    def _place(self, path: str) -> tuple[Node | None, str]:
        parts = path.removeprefix(self.root).strip("/").split("/")
        if parts == [""]:
            return None, ""
        folder = self.top
        for part in parts[:-1]:
            folder = folder.held[part]
        return folder, parts[-1]

    def _change(self, node: Node, old=None, new=None) -> None:
        change = Change(node, old, new)
        self.changes.append(change)
        _make(change, held=True)

    def _sync(self, node: Node) -> None:
        if not node.is_folder:
            node.synced = node.held
            return
        for change in [change for change in self.changes if change.settles is node]:
            _make(change, held=False)
            before = self.changes[: self.changes.index(change)]
            # that it came to its old name no longer matters: it has left that
            before = [one for one in before if change.old is None or one.new != change.old]
            self.changes = before + self.changes[self.changes.index(change) + 1 :]

    def files(self, kind: str, dice: random.Random) -> dict[str, bytes | None]:
        """The folder after a power failure now, by one of `KINDS`; or as it is now, `WRITTEN`."""
        names = {id(node): dict(node.synced) for node in _folders(self.top, self.changes)}
        for change in _surviving(self.changes, kind, dice):
            folder, name = change.old or (None, "")
            if folder and names[id(folder)].get(name) is not change.node:
                continue  # it was not there: an earlier change is lost
            if folder:
                del names[id(folder)][name]
            if change.new:
                names[id(change.new[0])][change.new[1]] = change.node
        found: dict[str, bytes | None] = {}

        def collect(folder: Node, path: str) -> None:
            for name, node in sorted(names[id(folder)].items()):
                found[path + name] = None if node.is_folder else _bytes(node, kind, dice)
                if node.is_folder:
                    collect(node, path + name + "/")

        collect(self.top, "")
        return found


def _make(change: Change, *, held: bool) -> None:
    for at, present in ((change.old, False), (change.new, True)):
        if at is not None:
            names = at[0].held if held else at[0].synced
            if present:
                names[at[1]] = change.node
            else:
                names.pop(at[1], None)


def _read(path: Path) -> Node:
    if not path.is_dir():
        content = path.read_bytes()
        return Node(content, content)
    nodes = {child.name: _read(child) for child in sorted(path.iterdir())}
    return Node(nodes, dict(nodes))


def _folders(top: Node, changes: list[Change]) -> list[Node]:
    """Every folder that may be in a state: held, synced or given up since."""
    found: dict[int, Node] = {}
    waiting = [top, *(change.node for change in changes)]
    waiting += [at[0] for change in changes for at in (change.old, change.new) if at]
    while waiting:
        node = waiting.pop()
        if node.is_folder and id(node) not in found:
            found[id(node)] = node
            waiting += [*node.held.values(), *node.synced.values()]
    return list(found.values())


def _surviving(changes: list[Change], kind: str, dice: random.Random) -> list[Change]:
    match kind:
        case "power: nothing":
            return []
        case "power: old names":
            return changes[: dice.randint(0, len(changes))]
        case "power: random":
            return [change for change in changes if dice.random() < 0.5]
    return changes


def _bytes(node: Node, kind: str, dice: random.Random) -> bytes:
    if node.synced is node.held:
        return node.held
    old, new, zeros, part = _versions(node)
    if kind == "power: random":
        return dice.choice([old, new, zeros, part])
    return {"power: zeros": zeros, "power: old names": new, WRITTEN: new}.get(kind, old)


def _versions(node: Node) -> tuple[bytes, ...]:
    """Synced bytes, new ones, new ones that are zeros, and the first half of the new ones."""
    old, new = node.synced, node.held
    if node.versions[:1] != (old,) or node.versions[1] is not new:
        same = len(old) if new.startswith(old) else 0
        zeros = new[:same] + bytes(len(new) - same)
        node.versions = (old, new, zeros, new[: (same + len(new)) // 2])
    return node.versions


def states(
    base: Path, root: Path, log: list[Logged], seed: int, at: Container[int] | None = None
) -> Iterator[State]:
    """The folders that a power failure may leave after each call.

    Args:
        base: the folder before the run.
        root: the folder that the calls name.
        log: the run.
        seed: of what is chosen at random.
        at: the numbers of the calls to stop after; None: each.
    """
    disk = Disk(base, root)
    saved: list[int] = []
    seen: set[tuple] = set()
    number = 0
    for logged in log:
        if logged.call is None:
            saved = [*saved, logged.saved]
            continue
        number += 1
        disk.apply(logged)
        for kind in KINDS if at is None or number in at else ():
            files = disk.files(kind, random.Random(f"{seed} {number} {kind}"))
            key = (tuple(saved), tree.digest_of(files))
            if key not in seen:
                seen.add(key)
                path = os.path.relpath(logged.call.path, root)
                yield State(number, kind, logged.call.op, path, saved, files)
