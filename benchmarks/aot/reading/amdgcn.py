"""Reads the assembly of AMD GPUs as triton returns it (`asm["amdgcn"]`)."""

from __future__ import annotations

import re

from benchmarks.aot.reading.code import Instruction

LINE = re.compile(r"^(?:(?P<label>\.?\w+):|\t(?P<opcode>[a-z]\w+)(?:[ \t]+(?P<operands>[^;\n]*))?)")
LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(?P<kind>\w+)")
WIDTHS = {
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
    "b32": 32,
    "b64": 64,
    "b96": 96,
    "b128": 128,
}
MATRIX = re.compile(r"v_(?:s?mfmac?|wmma)_\w*?(\d+)x(\d+)x(\d+)")


def parse(text: str) -> list[Instruction]:
    """The instructions of the only function in `text`.

    Raises:
        ValueError: there is none, or a jump to a label that is not there.
    """
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        if match["label"]:
            labels[match["label"]] = len(lines)
        else:
            lines.append((match["opcode"], (match["operands"] or "").strip()))
        if match["opcode"] == "s_endpgm" and not _jumps_beyond(lines, labels):
            break  # the rest is outside the function
    if not lines:
        raise ValueError("expected AMD assembly, got no instruction")
    return [_read(opcode, operands, labels) for opcode, operands in lines]


def _jumps_beyond(lines: list[tuple[str, str]], labels: dict[str, int]) -> bool:
    return any(x.startswith(("s_branch", "s_cbranch")) and to not in labels for x, to in lines)


def _read(opcode: str, operands: str, labels: dict[str, int]) -> Instruction:
    jump = opcode.startswith(("s_branch", "s_cbranch"))
    if jump and operands not in labels:
        raise ValueError(f"expected a label, got {opcode} {operands}")
    load = LOAD.fullmatch(opcode)
    shape = MATRIX.match(opcode)
    width = None
    if load:  # of one byte: ubyte, sbyte_d16; of two: ushort, short_d16_hi
        narrow = 8 if "byte" in load["kind"] else 16
        width = WIDTHS.get(load["kind"], narrow)
    return Instruction(
        opcode,
        targets=(labels[operands],) if jump else (),
        falls=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        load=width,
        copy=load is not None and ("_lds_" in opcode or operands.endswith(" lds")),
        matrix=(opcode.split("_f32")[0], tuple(map(int, shape.groups()))) if shape else None,
        barrier=opcode.startswith("s_barrier"),
        local=opcode.startswith("scratch_"),
    )
