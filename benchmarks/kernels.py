"""What Triton compiled our kernels to, compared with kernels.json, which is committed.

Registers, shared memory and spills do not wobble: the pinned triton brings its own assemblers. More
of them fails `python -m benchmarks.aot --subset --check benchmarks/kernels.json`, less asks for
`--write`. Another triton compiles to other numbers: there is nothing to compare then.
"""

import json
from pathlib import Path

GROWTH = {"registers": 0.1, "shared": 0.1, "spills": 0.0}  # allowed, relative
RENEW = "python -m benchmarks.aot --subset --write benchmarks/kernels.json"
Table = dict[str, dict[str, dict[str, int | str]]]  # target -> "kernel / call" -> counts and tile


def add(table: Table, target: str, name: str, tile: str, counts: dict[str, int]) -> None:
    """Enter one kernel; a second one of the same name, for another tile, is numbered."""
    kernels = table.setdefault(target, {})
    place = sum(known.partition(" #")[0] == name for known in kernels)
    kernels[f"{name} #{place + 1}" if place else name] = {**counts, "tile": tile}


def write(path: Path, version: str, table: Table) -> None:
    """One line for each kernel, so that a diff shows which of them changed."""
    targets = []
    for target, kernels in table.items():
        lines = [f"   {json.dumps(name)}: {json.dumps(x)}" for name, x in kernels.items()]
        targets.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
    body = ",\n".join(targets)
    text = f'{{\n "triton": {json.dumps(version)},\n "kernels": {{\n{body}\n }}\n}}\n'
    path.write_text(text, encoding="utf-8")


def changes(new: Table, old: Table) -> tuple[list[str], list[str]]:
    """(what grew or is new or gone, what shrank), one sentence each.

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
            for kind, allowed in GROWTH.items():
                sentence = f"{target} {name}: {kind} {b[kind]} -> {a[kind]}{tile}"
                if a[kind] > b[kind] * (1 + allowed):
                    worse.append(sentence)
                elif a[kind] < b[kind] * (1 - allowed):
                    better.append(sentence)
    return worse, better


def read(path: Path) -> tuple[str, Table]:
    """(triton's version, table).

    Raises:
        ValueError: the file is not one that `write` wrote.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["triton"], content["kernels"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `write` wrote, got {error!r}") from error


def check(committed: tuple[str, Table], version: str, new: Table) -> int:
    """Print what changed; how many entries are worse. None are, where triton is another one."""
    of, old = committed
    if version != of:
        print(f"not compared: the committed numbers are of triton {of} and this is {version}")
        return 0
    worse, better = changes(new, old)
    for sentence in worse:
        print(f"  MORE: {sentence}")
    for sentence in better:
        print(f"  less: {sentence}")
    if worse or better:
        print(f"where that is meant, make it the measure: {RENEW}")
    print(f"{len(worse)} worse than committed, {len(better)} better")
    return len(worse)
