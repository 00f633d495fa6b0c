"""Reads the machine code of NVIDIA GPUs as `cuobjdump -sass` prints it."""

from __future__ import annotations

import re
from dataclasses import replace

from benchmarks.aot.reading.code import Instruction

LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);", re.M
)
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# HMMA.16816 and its kind run the digits of m, n and k together; HGMMA.64x16x16 does not.
WARP_SHAPES = {
    "884": (8, 8, 4),
    "1684": (16, 8, 4),
    "1688": (16, 8, 8),
    "16816": (16, 8, 16),
    "16832": (16, 8, 32),
}


def parse(text: str) -> list[Instruction]:
    """The instructions of the only function in `text`.

    Raises:
        ValueError: there is none, or a jump to a place that is not there.
    """
    lines = [(int(at, 16), guard, *rest) for at, guard, *rest in LINE.findall(text)]
    if not lines:
        raise ValueError("expected the output of cuobjdump -sass, got no instruction")
    places = {address: place for place, (address, *_) in enumerate(lines)}
    syncs: dict[str, int] = {}  # convergence register -> where the threads of its last BSSY meet
    code = []
    for _, guard, opcode, operands in lines:
        name = opcode.split(".")[0]
        instruction = _read(name, opcode)
        targets = re.findall(r"0x[0-9a-f]+", operands)[-1:]
        if name == "BSSY" and targets:
            syncs[operands.split(",")[0].strip()] = int(targets[0], 16)
        elif name == "BSYNC":  # where the threads continue together
            meeting = syncs.get(operands.split(",")[-1].strip())
            jump = () if meeting is None else (places[meeting],)
            instruction = replace(instruction, targets=jump)
        elif name in ("BRA", "JMP"):
            if not targets or int(targets[0], 16) not in places:
                raise ValueError(f"expected the address of a jump, got {opcode} {operands}")
            jump = places[int(targets[0], 16)]
            falls = bool(guard) or "," in operands or ".DIV" in opcode
            instruction = replace(instruction, targets=(jump,), falls=falls)
        elif name in ("EXIT", "RET", "BRX"):
            instruction = replace(instruction, falls=bool(guard))
        code.append(instruction)
    return code


def _read(name: str, opcode: str) -> Instruction:
    parts = opcode.split(".")[1:]
    load = None
    if name in ("LDG", "LDGSTS"):
        load = next((WIDTHS[part] for part in parts if part in WIDTHS), 32)
    return Instruction(
        opcode,
        load=load,
        copy=name in ("LDGSTS", "UTMALDG", "UBLKCP"),
        matrix=_matrix(name, parts),
        barrier=name == "BAR",
        local=name in ("LDL", "STL"),
    )


def _matrix(name: str, parts: list[str]) -> tuple[str, tuple[int, ...]] | None:
    if re.fullmatch(r"[A-Z]GMMA", name):  # wgmma
        return name, tuple(map(int, parts[0].split("x")))
    if re.fullmatch(r"[A-Z]MMA", name):
        shape = next((WARP_SHAPES[part] for part in parts if part in WARP_SHAPES), ())
        return name, shape
    if re.fullmatch(r"UTC[A-Z]*MMA", name):  # tcgen05; a descriptor has its shape
        return name, ()
    return None
