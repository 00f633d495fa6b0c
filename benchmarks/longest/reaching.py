"""The longest sample on a card, by method and by what is done for memory: `memory.peak` searched
for the length at which it reaches what the card has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from benchmarks.longest import memory
from benchmarks.longest.setting import EAGER, MAPS, METHODS, OURS, SDPA, Setting
from benchmarks.training_step.model import SHAPES

GB = 1e9
CARDS = (80, 141)  # GB
RESERVED = 4 * GB  # of a card: CUDA itself, workspaces of its libraries, fragments
GRAIN, MOST = 1024, 2**24  # tokens: the search goes no finer, and no further
SHAPES_OF_TABLE = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
TITLES = {OURS: "groundkern", SDPA: "sdpa", EAGER: "eager", MAPS: "eager, maps"}
LONG = 131_072
PARTS = (
    *("weights", "gradients", "optimizer", "inputs", "our tensors", "layer inputs", "norms"),
    *("inputs of linear layers", "attention", "K/V", "feed-forward", "temporaries"),
)


class Way(NamedTuple):
    """What is done for memory."""

    title: str
    checkpointed: bool = False
    offload: bool = False
    tiled: bool = False


class Training(NamedTuple):
    """What is trained, in which numbers."""

    title: str
    precision: str
    lora: int | None = None


WAYS = (
    Way("nothing"),
    Way("checkpointed", True),
    Way("and offloaded", True, True),
    Way("and tiled", True, True, True),
)
TRAININGS = (
    Training("all weights, fp32 AdamW", "float32 + bf16 autocast"),
    Training("all weights, 8-bit AdamW", "bfloat16, 8-bit optimizer"),
    Training("LoRA, rank 16", "bfloat16", 16),
)


def setting(shape: str, training: Training, way: Way, method: str, tokens: int) -> Setting:
    """One step on a GPU.

    Args:
        shape: of `SHAPES`.
        training: of TRAININGS.
        way: of WAYS.
        method: of METHODS.
        tokens: of the sample.
    """
    return Setting(
        SHAPES[shape],
        method,
        tokens,
        training.precision,
        lora=training.lora,
        triton=True,
        checkpointed=way.checkpointed,
        offload=way.offload,
        tiled=way.tiled,
    )


def longest(start: Setting, card: float) -> int:
    """Tokens of the longest sample whose step fits, in steps of GRAIN; 0: none does.

    Args:
        start: a step, whose length does not count.
        card: bytes that it may have.
    """
    low, high = 0, MOST // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory.peak_bytes(replace(start, tokens=middle * GRAIN)) <= card
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * GRAIN


def table(shape: str) -> list[str]:
    """Markdown: thousands of tokens on each of CARDS.

    Args:
        shape: of `SHAPES`.
    """
    lines = [
        f"| {shape} | for memory | " + " | ".join(TITLES[m] for m in METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for training in TRAININGS:
        for way in WAYS:
            cells = [_cell(shape, training, way, method) for method in METHODS]
            lines.append(f"| {training.title} | {way.title} | {' | '.join(cells)} |")
    return lines


def components_table(shape: str = "qwen2.5-vl-7b", tokens: int = LONG) -> list[str]:
    """Markdown: GB by component at the highest moment of a step of ours.

    Args:
        shape: of `SHAPES`.
        tokens: of the sample.
    """
    found, training = [], TRAININGS[1]
    for way in WAYS:
        name, parts = memory.peak(setting(shape, training, way, OURS, tokens))
        found.append((way, name, parts))
    names = [*PARTS, *(n for _, _, parts in found for n in parts if n not in PARTS)]
    lines = [
        f"| {shape}, {tokens:,} tokens | " + " | ".join(way.title for way, _, _ in found) + " |",
        "|---|" + "---|" * len(found),
        "| highest at | " + " | ".join(name for _, name, _ in found) + " |",
    ]
    for name in dict.fromkeys(names):
        cells = [f"{parts[name] / GB:.1f}" if parts.get(name) else "" for _, _, parts in found]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = " | ".join(f"**{sum(parts.values()) / GB:.1f}**" for _, _, parts in found)
    return [*lines, f"| GB in all | {totals} |"]


def _cell(shape: str, training: Training, way: Way, method: str) -> str:
    lengths = []
    for card in CARDS:
        start = setting(shape, training, way, method, GRAIN)
        found = longest(start, card * GB - RESERVED)
        lengths.append(f"{found // GRAIN}" if found else "—")
    return " / ".join(lengths)
