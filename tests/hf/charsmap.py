"""SentencePiece's compiled normalisation rules, made from a table: what `Precompiled` reads.

A file's `precompiled_charsmap` is a double array of the rules' left sides (darts-clone), preceded
by its size in bytes, and their right sides, each ended by NUL.
"""

from __future__ import annotations

import struct


def charsmap(rules: dict[str, str]) -> bytes:
    """The rules in SentencePiece's own form."""
    texts = b""
    root: dict = {}
    for left, right in rules.items():
        node = root
        for byte in left.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)  # a leaf: where its right side begins
        texts += right.encode() + b"\0"
    units, used = {0: 0}, {0}
    _place(root, 0, units, used)
    size = (max(units) // 256 + 1) * 256
    array = struct.pack(f"<{size}I", *(units.get(unit, 0) for unit in range(size)))
    return struct.pack("<I", len(array)) + array + texts


def _place(node: dict, at: int, units: dict[int, int], used: set[int]) -> None:
    """Find an offset at which all children of a node have free units."""
    offset = 1
    while any(at ^ offset ^ byte in used for byte in node):
        offset += 1
    units[at] |= offset << 10 | (1 << 8 if 0 in node else 0)
    for byte, child in node.items():
        child_at = at ^ offset ^ byte
        used.add(child_at)
        units[child_at] = byte if byte else child | 1 << 31
    for byte, child in node.items():
        if byte:
            _place(child, at ^ offset ^ byte, units, used)
