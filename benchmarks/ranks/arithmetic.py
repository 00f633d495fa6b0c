"""How many bytes a process of a training run holds, by counting: `python -m
benchmarks.ranks.arithmetic`.

Activations are what autograd keeps of a Qwen2.5-VL decoder layer between forward and backward, one
term for each tensor; `tests/test_arithmetic.py` compares them with what autograd really keeps.
Weights, gradients and optimizer states are compared with those of two processes by
`benchmarks.ranks.memory`.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from benchmarks.training_step.kept import (
    FP32,
    PRECISIONS,
    Precision,
    adapter_parameters,
    layer_activations,
    parameters,
    plain_logits,
)
from benchmarks.training_step.model import SHAPES, Shape

GIB = 2**30
SHARDED = ("fsdp2", "zero3")
DEEPSPEED = 12  # bytes of a weight's fp32 copy, which fp32 weights have too, and its two moments
LENGTHS = (8192, 32768)
RANKS = 8
CARD = 80e9  # bytes, of which some are CUDA's own


class States(NamedTuple):
    """Bytes that a process holds all the time, and weights that it gathers for a while."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(self)


def states(
    shape: Shape, precision: Precision, strategy: str, *, ranks: int, adapters: int | None = None
) -> States:
    """Weights, gradients and optimizer states of one process; the vision tower is frozen.

    Args:
        shape: of the model.
        precision: of `PRECISIONS`.
        strategy: ddp, fsdp2 or zero3.
        ranks: processes that share the weights, if they are sharded.
        adapters: parameters of fp32 adapters, beside which nothing trains; None: all of the decoder
            trains.
    """
    counted = parameters(shape)
    share = ranks if strategy in SHARDED else 1
    everything = counted.decoder + counted.vision
    own = DEEPSPEED if strategy == "zero3" else None
    if adapters is None:
        weights = everything * precision.weight
        gradients = counted.decoder * precision.gradient
        optimizer = counted.decoder * (own or precision.optimizer)
    else:
        weights = everything * precision.weight + adapters * FP32
        gradients, optimizer = adapters * FP32, adapters * (own or 2 * FP32)
    gathered = 0.0
    if strategy in SHARDED:  # a layer, the next one ahead of time, embeddings and head
        gathered = (2 * counted.layer + counted.ends) * precision.linear
    elif precision.copies:
        gathered = counted.layer * counted.layers * precision.copies
    return States(weights / share, gradients / share, optimizer / share, gathered)


def activations(
    shape: Shape, precision: Precision, tokens: int, *, checkpointed: bool, side: int = 0
) -> int:
    """Bytes of the decoder's activations at their peak; the vision tower is frozen.

    Args:
        shape: of the model.
        precision: of `PRECISIONS`.
        tokens: of a process in one forward pass.
        checkpointed: keep the layers' inputs, and one layer's activations while it is recomputed.
        side: side tokens of SMAM, which go through every layer too.
    """
    layer = (tokens + side) * layer_activations(shape, precision)
    layer += (tokens * shape.hidden * precision.linear) if side else 0
    if not checkpointed:
        return shape.layers * layer
    return shape.layers * (tokens + side) * shape.hidden * precision.stream + layer


class Row(NamedTuple):
    """A way to train a model."""

    title: str
    strategy: str
    precision: str
    lora: int | None = None


ROWS = (
    Row("DDP, full", "ddp", "float32 + bf16 autocast"),
    Row("FSDP2, full", "fsdp2", "float32 + bf16 autocast"),
    Row("ZeRO-3, full", "zero3", "bfloat16 + fp32 master"),
    Row("FSDP2, full, 8-bit optimizer", "fsdp2", "bfloat16, 8-bit optimizer"),
    Row("DDP, LoRA", "ddp", "bfloat16", lora=16),
    Row("FSDP2, LoRA", "fsdp2", "bfloat16", lora=16),
)


def states_table(names: tuple[str, ...], ranks: int = RANKS) -> list[str]:
    """Markdown: GB per process of what does not depend on the length.

    Args:
        names: of `SHAPES`.
        ranks: processes.
    """
    lines = [
        "| model | | weights | gradients | optimizer | gathered | GB in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for row in ROWS:
            found = _states(name, row, ranks)
            cells = " | ".join(_gb(x) for x in (*found, found.total))
            lines.append(f"| {name} | {row.title} ({row.precision}) | {cells} |")
    return lines


def lengths_table(names: tuple[str, ...], lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    """Markdown: GB per process of what grows with the length, for one sample in bfloat16.

    Args:
        names: of `SHAPES`.
        lengths: tokens of a sample.
    """
    precision = PRECISIONS["bfloat16"]
    lines = [
        "| model | tokens | activations | checkpointed | side tokens | plain logits |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        shape = SHAPES[name]
        for length in lengths:
            kept = activations(shape, precision, length, checkpointed=False)
            few = activations(shape, precision, length, checkpointed=True)
            side = activations(shape, precision, length, checkpointed=True, side=64) - few
            logits = plain_logits(shape, length)
            cells = " | ".join(_gb(x) for x in (kept, few, side, logits))
            lines.append(f"| {name} | {length:,} | {cells} |")
    return lines


def fits_table(
    names: tuple[str, ...], lengths: tuple[int, ...] = LENGTHS, ranks: int = RANKS
) -> list[str]:
    """Markdown: GB per process of everything, checkpointed, one sample; bold where it fits.

    Args:
        names: of `SHAPES`.
        lengths: tokens of a sample.
        ranks: processes.
    """
    lines = [
        "| model | | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for name in names:
        for row in ROWS:
            held, precision = _states(name, row, ranks).total, PRECISIONS[row.precision]
            cells = []
            for length in lengths:
                kept = activations(SHAPES[name], precision, length, checkpointed=True, side=64)
                total = held + kept
                cells.append(f"**{_gb(total)}**" if total < CARD else _gb(total))
            lines.append(f"| {name} | {row.title} | {' | '.join(cells)} |")
    return lines


def _states(name: str, row: Row, ranks: int) -> States:
    shape = SHAPES[name]
    adapters = None if row.lora is None else adapter_parameters(shape, row.lora)
    return states(shape, PRECISIONS[row.precision], row.strategy, ranks=ranks, adapters=adapters)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 else f"{count / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks.arithmetic")
    parser.add_argument("--shape", nargs="+", default=["qwen2.5-vl-7b", "qwen2.5-vl-72b"])
    parser.add_argument("--ranks", type=int, default=RANKS)
    arguments = parser.parse_args()
    names = tuple(arguments.shape)
    for table in (states_table(names, arguments.ranks), lengths_table(names)):
        print("\n".join(table), end="\n\n")
    print("\n".join(fits_table(names, ranks=arguments.ranks)))


if __name__ == "__main__":
    main()
