"""Loops of machine code, for any machine, and the counts of the main one.

Loops are found as compilers find them: a jump back to an instruction through which every path to
the jump leads. A jump back alone is not enough: code for a rare case often stands at the end of a
kernel and jumps back into the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Instruction:
    """One instruction, and where control goes from it.

    targets: indices, in the list of all instructions, that it may jump to. falls: whether the next
    instruction may follow. load: width in bits of one thread's load from global memory, including
    copies to shared memory. copy: an asynchronous copy to shared memory. matrix: (name, (m, n, k))
    of a matrix instruction; () if the text does not say its shape. local: a load or store of local
    memory: a spill.
    """

    opcode: str
    targets: tuple[int, ...] = ()
    falls: bool = True
    load: int | None = None
    copy: bool = False
    matrix: tuple[str, tuple[int, ...]] | None = None
    barrier: bool = False
    local: bool = False


@dataclass(frozen=True)
class Loop:
    """The most that one iteration of a loop does: instructions under a branch count too."""

    instructions: int
    barriers: int
    loads: dict[int, int] = field(default_factory=dict)  # width in bits -> how many
    copies: int = 0
    matrix: dict[str, int] = field(default_factory=dict)  # "HGMMA 64x16x16" -> how many
    n: int | None = None  # the smallest of a matrix instruction
    local: int = 0


def summary(code: list[Instruction]) -> Loop:
    """The counts of some instructions."""
    loads: dict[int, int] = {}
    matrix: dict[str, int] = {}
    for instruction in code:
        if instruction.load is not None:
            loads[instruction.load] = loads.get(instruction.load, 0) + 1
        if instruction.matrix is not None:
            name, shape = instruction.matrix
            name = f"{name} {'x'.join(map(str, shape))}".strip()
            matrix[name] = matrix.get(name, 0) + 1
    shapes = [x.matrix[1] for x in code if x.matrix is not None and x.matrix[1]]
    return Loop(
        instructions=len(code),
        barriers=sum(x.barrier for x in code),
        loads=dict(sorted(loads.items(), reverse=True)),
        copies=sum(x.copy for x in code),
        matrix=matrix,
        n=min((shape[1] for shape in shapes), default=None),
        local=sum(x.local for x in code),
    )


def main_loop(code: list[Instruction]) -> Loop | None:
    """The innermost loop with most matrix instructions.

    If none has any, the deepest of the innermost loops, and of these the longest. None without a
    loop.
    """
    found = loops(code)
    matrix = [{at for at in loop if code[at].matrix is not None} for loop in found]
    if any(matrix):
        found = [loop for loop, inside in zip(found, matrix, strict=True) if inside]
    inner = [loop for loop in found if not any(other < loop for other in found)]
    if not inner:
        return None

    def rank(loop: frozenset[int]) -> tuple[int, int, int]:
        products = sum(code[at].matrix is not None for at in loop)
        return products, sum(loop < other for other in found), len(loop)

    best = max(inner, key=rank)  # of equals, the first
    return summary([code[at] for at in sorted(best) if code[at].opcode not in ("NOP", "s_nop")])


def loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as indices of their instructions, in the order of their first one."""
    starts, after = _blocks(code)
    dominators = _dominators(after)
    bodies: dict[int, set[int]] = {}
    before: dict[int, list[int]] = {}
    for block, following in after.items():
        for other in following:
            before.setdefault(other, []).append(block)
    for block, following in after.items():
        for head in following:
            if block not in dominators or head not in dominators[block]:
                continue
            body, todo = bodies.setdefault(head, {head}), [block]
            while todo:
                at = todo.pop()
                if at not in body:
                    body.add(at)
                    todo += [x for x in before.get(at, []) if x in dominators]
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    places = (
        frozenset(at for block in bodies[head] for at in range(block, ends[block]))
        for head in sorted(bodies)
    )
    return [loop for loop in places if len(loop) > 1]  # the trap behind the end jumps to itself


def _blocks(code: list[Instruction]) -> tuple[list[int], dict[int, list[int]]]:
    """The index of each basic block's first instruction, and the blocks that may follow each."""
    leaders = {0}
    for at, instruction in enumerate(code):
        if instruction.targets or not instruction.falls:
            leaders |= {*instruction.targets, at + 1}
    starts = sorted(x for x in leaders if x < len(code))
    after = {}
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last = code[end - 1]
        following = list(last.targets)
        if last.falls and end < len(code):
            following.append(end)
        after[start] = following
    return starts, after


def _dominators(after: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each reachable block, the blocks through which every path to it leads."""
    reached, todo = [], [0] if after else []
    while todo:
        block = todo.pop()
        if block not in reached:
            reached.append(block)
            todo += after[block]
    before: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for other in after[block]:
            before[other].append(block)
    found = {block: set(reached) for block in reached}
    found |= {0: {0}} if reached else {}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            new = {block} | set.intersection(*(found[x] for x in before[block]))
            changed = changed or new != found[block]
            found[block] = new
    return found


def shaped(loop: Loop | None, name: str, shapes: list[tuple[int, ...]]) -> Loop | None:
    """`loop` with the shapes, read elsewhere, of a matrix instruction whose text has none."""
    if loop is None or name not in loop.matrix or not shapes:
        return loop
    rest = {other: count for other, count in loop.matrix.items() if other != name}
    joined = ",".join("x".join(map(str, shape)) for shape in dict.fromkeys(shapes))
    smallest = min(shape[1] for shape in shapes)
    return replace(loop, matrix=rest | {f"{name} {joined}": loop.matrix[name]}, n=smallest)
