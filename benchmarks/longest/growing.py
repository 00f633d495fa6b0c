"""What a step of ours holds that grows with the length of the sample though its rows do not.

Counted by name from sizes; `tests/test_longest.py` compares those that are made beside the model
with what torch's allocator is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.training_step.kept import FP32
from benchmarks.training_step.model import SHAPES, Shape

LENGTHS = (131_072, 2**20)
SETS, ROWS = 64, 64  # sets of regions, and map rows, of a well supervised sample
BOOLEAN, INTEGER, BF16 = 1, 4, 2


class Growing(NamedTuple):
    """Something that grows: its name, its size, what it is for, and its bytes by length."""

    name: str
    size: str
    why: str
    bytes: tuple[float, ...]


def growing(shape: Shape, lengths: tuple[int, ...] = LENGTHS) -> list[Growing]:
    """All of them, by bytes at the last length.

    Args:
        shape: of a model in bfloat16.
        lengths: tokens of a sample, three quarters of them visual.
    """
    inner = shape.heads * (shape.hidden // shape.heads)

    def of(name: str, size: str, why: str, token: float, visual: float = 0.0) -> Growing:
        found = tuple(length * (token + 0.75 * visual) for length in lengths)
        return Growing(name, size, why, found)

    found = [
        of(
            "side tokens' join",
            "[S + R, Hq D] of a layer",
            "attention's output once more, with the side tokens behind it",
            inner * BF16,
        ),
        of("`gk_map_target`", "int32 [R, C]", "KLAL's targets", 0, ROWS * INTEGER),
        of("the same as fp32", "[R, C]", "what the op reads", 0, ROWS * FP32),
        of("attention_kl's map", "fp32 [R, C] of a layer", "kept for its backward", 0, ROWS * FP32),
        of("own columns", "2 bool [R, C]", "of the row's image; that it sees", 0, 2 * ROWS),
        of("`gk_side_inside`", "bool [G, S]", "SMAM's sets", SETS * BOOLEAN),
        of(
            "key sets in the making", "3 bool [G, S], for a moment", "then bits", (3 + 1 / 8) * SETS
        ),
        of("bits", "2 int32 [G, S / 32]", "SMAM's and KLAL's key sets", (SETS + ROWS) / 8),
        of("`gk_image`, `gk_map_columns`", "int32 [S], int32 [C]", "the tokens", 4, 4),
    ]
    return sorted(found, key=lambda one: -one.bytes[-1])


def table(shape: str = "qwen2.5-vl-7b") -> list[str]:
    """Markdown: MB by length.

    Args:
        shape: of `SHAPES`.
    """
    lines = [
        "| what | size | why | " + " | ".join(f"{n:,} tokens" for n in LENGTHS) + " |",
        "|---|---|---|" + "---|" * len(LENGTHS),
    ]
    for one in growing(SHAPES[shape]):
        cells = " | ".join(f"{size / 1e6:,.1f}" for size in one.bytes)
        lines.append(f"| {one.name} | {one.size} | {one.why} | {cells} |")
    return lines
