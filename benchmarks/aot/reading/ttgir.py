"""Reads triton's intermediate representations, ttir and ttgir, for what machine code does not
say."""

from __future__ import annotations

import re

DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
WAIT = re.compile(r"\b\w+\.async_wait\b.*\{num = (\d+)")
DEFINED = re.compile(r"(%[\w#]+)(?::\d+)? = ")
TENSOR_MEMORY = re.compile(r"!ttg\.memdesc<(\d+)x(\d+)xf32, [^>]*tensor_memory")


def main_loop(ttgir: str) -> list[str]:
    """Lines of the innermost loop with most dots, the first of equals; empty if no loop has a
    dot."""
    found: list[list[str]] = []
    stack: list[tuple[int, list[str], bool]] = []  # indent, lines, whether it contains another loop
    for line in ttgir.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stack and indent == stack[-1][0] and stripped[:1] == "}" and stripped[-1:] != "{":
            _, lines, outer = stack.pop()
            if not outer:
                found.append(lines)
            if stack:
                stack[-1] = (*stack[-1][:2], True)
        elif re.search(r"\bscf\.(for|while)\b", line):
            stack.append((indent, [], False))
        else:
            for _, lines, _ in stack:
                lines.append(stripped)
    dots = [sum(bool(DOT.search(x)) for x in lines) for lines in found]
    return found[dots.index(max(dots))] if dots and max(dots) else []


def in_flight(ttgir: str) -> int | None:
    """How many groups of asynchronous copies are still in flight when the main loop waits for the
    ones it needs: the fewest over its waits. None if it never waits."""
    waits = (WAIT.search(line) for line in main_loop(ttgir))
    return min((int(match.group(1)) for match in waits if match), default=None)


def tensor_memory_shapes(ttgir: str) -> list[tuple[int, int]]:
    """(m, n) of the main loop's products into tensor memory (tcgen05)."""
    lines = (line for line in main_loop(ttgir) if "ttng.tc_gen5_mma" in line)
    matches = (TENSOR_MEMORY.findall(line) for line in lines)
    return [(int(m), int(n)) for found in matches for m, n in found[-1:]]


def narrowed(ttir: str) -> list[str]:
    """Lines of Triton IR that sum in 16 bits.

    A dot whose result is not fp32, or a value rounded to 16 bits for anything but an operand of a
    dot, a store, or to be subtracted from what it was. No test of results in the interpreter would
    see either: there, dots compute in wider types.
    """
    lines = [line.strip() for line in ttir.splitlines()]
    found = [x for x in lines if " tt.dot " in x and not re.search(r"-> tensor<[\dx]+xf32[,>]", x)]
    rounded: set[str] = set()
    widened: set[str] = set()  # made fp32 again, to tell what was lost
    for line in lines:
        if line.startswith("^"):  # a block: what stands there are names of its own
            given = re.findall(r"%[\w#]+", line)
            rounded.difference_update(given)
            widened.difference_update(given)
            continue
        name, right = "", line.rpartition(" = ")[2]
        # Regions beside one another use the same names.
        for name in reversed(DEFINED.findall(line)):
            rounded.discard(name)
            widened.discard(name)
        operands = re.findall(r"%[\w#]+", right)
        used = bool(rounded & set(operands))
        lost = right.startswith("arith.subf") and operands[0] not in widened
        if widened & set(operands) and not lost:
            found.append(line)
        moved = used and re.match(r"tt\.(trans|reshape)|ttg?\.convert_layout", right)
        if moved or re.search(r"arith\.truncf .*x(bf16|f16)", right):
            rounded.add(name)
        elif used and right.startswith("arith.extf"):
            widened.add(name)
        elif used and not re.match(r"tt\.(dot|store)\b", right):
            found.append(line)
    return found
