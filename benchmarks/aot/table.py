"""What Triton compiled our kernels to, compared with kernels.json, which is committed.

None of it varies from run to run. Each Triton brings its own assemblers, so each version has its
own entry. Anything worse fails `python -m benchmarks.aot --subset --check benchmarks/kernels.json`;
anything better asks for `--write`, which replaces the entry of the running version alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

RENEW = "python -m benchmarks.aot --subset --write benchmarks/kernels.json"
Entry = dict[str, object]  # registers, shared, spills, local, tile, and loop: its counts or None
Table = dict[str, dict[str, Entry]]  # target -> "kernel / call" -> entry
Version = dict[str, dict]  # "kernels": Table, "variants": kernel -> count

# (what it is called, where to find it, 1 if more is worse and -1 if less is, what is allowed)
KERNEL = (
    ("registers", "registers", 1, 0.1),
    ("shared", "shared", 1, 0.1),
    ("spills", "spills", 1, 0.0),
    ("loads and stores of local memory", "local", 1, 0.0),
)
LOOP = (
    ("instructions in the loop", "instructions", 1, 0.1),
    ("barriers in the loop", "barriers", 1, 0.0),
    ("bits of the loop's widest load", "widest", -1, 0.0),
    ("bits of the loop's narrowest load", "narrowest", -1, 0.0),
    ("groups of copies in flight", "in_flight", -1, 0.0),
    ("n of the matrix instruction", "n", -1, 0.0),
    ("local memory in the loop", "local", 1, 0.0),
)


def add(table: Table, target: str, name: str, entry: Entry) -> None:
    """Enters one kernel; a second one of the same name, for another tile, gets a number."""
    kernels = table.setdefault(target, {})
    place = sum(known.partition(" #")[0] == name for known in kernels)
    kernels[f"{name} #{place + 1}" if place else name] = entry


def read(path: Path) -> dict[str, Version]:
    """triton's version -> what it compiled to.

    Raises:
        ValueError: the file is not one that `write` wrote.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for version in content.values():
            version["kernels"], version["variants"]
        return content
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `write` wrote, got {error!r}") from error


def write(path: Path, version: str, table: Table, variants: dict[str, int]) -> None:
    """Replaces the entry of one version. Each kernel has a line, so that a diff shows what
    changed."""
    content = read(path) if path.exists() else {}
    content[version] = {"variants": variants, "kernels": table}
    parts = []
    for name, entry in sorted(content.items()):
        targets = []
        for target, kernels in entry["kernels"].items():
            lines = [f"    {json.dumps(kernel)}: {json.dumps(x)}" for kernel, x in kernels.items()]
            targets.append(f"   {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n   }")
        counts = json.dumps(entry["variants"])
        body = f'  "variants": {counts},\n  "kernels": {{\n' + ",\n".join(targets) + "\n  }"
        parts.append(f" {json.dumps(name)}: {{\n{body}\n }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def changes(new: Table, old: Table) -> tuple[list[str], list[str]]:
    """(what is worse, new or gone; what is better), one sentence each.

    Args:
        new: of the targets to compare; others in `old` are left out.
    """
    worse, better = [], []
    for target, kernels in new.items():
        before = old.get(target, {})
        for name in sorted({*kernels, *before}):
            if name not in kernels or name not in before:
                what = "is gone" if name in before else "is not in the file"
                worse.append(f"{target} {name} {what}")
                continue
            a, b = kernels[name], before[name]
            tile = "" if a["tile"] == b["tile"] else f" (tile {b['tile']} -> {a['tile']})"
            for sign, sentence in _compared(a, b):
                (worse if sign > 0 else better).append(f"{target} {name}: {sentence}{tile}")
    return worse, better


def _compared(new: Entry, old: Entry) -> Iterator[tuple[int, str]]:
    """(1 for worse or -1 for better, sentence) for what differs by more than is allowed."""
    pairs = [(KERNEL, new, old)]
    loops = new["loop"], old["loop"]
    if None in loops and loops != (None, None):
        yield 1, "has no loop any more" if loops[0] is None else "has a loop now"
    elif None not in loops:
        pairs.append((LOOP, *map(_measures, loops)))
    for rules, a, b in pairs:
        for what, key, sign, allowed in rules:
            sentence = f"{what} {b[key]} -> {a[key]}"
            if a[key] > b[key] * (1 + allowed):
                yield sign, sentence
            elif a[key] < b[key] * (1 - allowed):
                yield -sign, sentence


def _measures(loop: dict) -> dict[str, int]:
    """A loop's counts as numbers. Nothing loaded or multiplied is 0; having no copy is less than
    having none in flight."""
    widths = [int(width) for width in loop["loads"]] or [0]
    return {
        **loop,
        "widest": max(widths),
        "narrowest": min(widths),
        "in_flight": -1 if loop["in_flight"] is None else loop["in_flight"],
        "n": loop["n"] or 0,
    }


def more_variants(new: dict[str, int], old: dict[str, int]) -> tuple[list[str], list[str]]:
    """(kernels of which more variants are compiled, those of which fewer are), one sentence
    each."""
    pairs = [(name, old.get(name, 0), new.get(name, 0)) for name in sorted({*new, *old})]
    sentences = [(b, a, f"variants of {name}: {a} -> {b}") for name, a, b in pairs]
    return [x for b, a, x in sentences if b > a], [x for b, a, x in sentences if b < a]


def check(
    committed: dict[str, Version], version: str, table: Table, variants: dict[str, int]
) -> int:
    """Prints what changed and returns how many entries are worse; 1 if there is nothing to compare
    with."""
    if version not in committed:
        there = ", ".join(committed) or "none"
        print(f"nothing to compare with: there is no entry for triton {version} (of {there})")
        return 1
    old = committed[version]
    found = (changes(table, old["kernels"]), more_variants(variants, old["variants"]))
    worse, better = ([x for part in found for x in part[i]] for i in range(2))
    for sentence in worse:
        print(f"  WORSE: {sentence}")
    for sentence in better:
        print(f"  better: {sentence}")
    if worse or better:
        print(f"where that is meant, make it the measure: {RENEW}")
    print(f"{len(worse)} worse than committed, {len(better)} better")
    return len(worse)
