"""How many bytes a process of a training run holds, by counting: `python -m
benchmarks.ranks.arithmetic`.

Activations are what autograd keeps of a Qwen2.5-VL decoder layer between forward and backward, one
term for each tensor; `tests/test_arithmetic.py` compares them with what autograd really keeps.
Weights, gradients and optimizer states are compared with those of two processes by
`benchmarks.ranks.memory`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.training_step.model import SHAPES, Shape, build

GIB = 2**30
SHARDED = ("fsdp2", "zero3")
FP32 = 4
DEEPSPEED = 12  # bytes of a weight's fp32 copy, which fp32 weights have too, and its two moments
LENGTHS = (8192, 32768)
RANKS = 8
CARD = 80e9  # bytes, of which some are CUDA's own


@dataclass(frozen=True)
class Precision:
    """Bytes of a number: of a weight, its gradient and its optimizer state; of what layers pass on
    to each other, of what linear layers keep.

    `copies`: autocast makes a copy of each weight that a linear layer multiplies with. `casts`: and
    one of its input for every such layer.
    """

    weight: int
    gradient: int
    optimizer: int
    stream: int
    linear: int
    copies: int = 0
    casts: bool = False


PRECISIONS = {
    "float32": Precision(4, 4, 8, 4, 4),
    "float32 + bf16 autocast": Precision(4, 4, 8, 4, 2, copies=2, casts=True),
    "bfloat16": Precision(2, 2, 4, 2, 2),
    "bfloat16, 8-bit optimizer": Precision(2, 2, 2, 2, 2),
    "bfloat16 + fp32 master": Precision(2, 2, 12, 2, 2),  # DeepSpeed's
}


class Parameters(NamedTuple):
    """Of the vision tower, of one decoder layer, and of embeddings and head together."""

    vision: int
    layer: int
    ends: int
    layers: int

    @property
    def decoder(self) -> int:
        return self.layer * self.layers + self.ends


class States(NamedTuple):
    """Bytes that a process holds all the time, and weights that it gathers for a while."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(self)


@cache
def parameters(shape: Shape) -> Parameters:
    """Counted on a model without memory.

    Args:
        shape: of the model.
    """
    with torch.device("meta"):
        model = build(shape, torch.device("meta"), torch.bfloat16)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers = model.model.language_model.layers
    vision, layer = count(model.model.visual), count(layers[0])
    return Parameters(vision, layer, count(model) - vision - layer * len(layers), len(layers))


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


def layer_activations(shape: Shape, precision: Precision, *, plain: bool = True) -> int:
    """Bytes per token that autograd keeps of one decoder layer.

    Args:
        shape: of the model.
        precision: of `PRECISIONS`.
        plain: without side tokens, which keep the attention's output twice, alone and joined.
    """
    d = shape.hidden // shape.heads
    inner, kv = shape.heads * d, shape.kv * d
    norms = 2 * shape.hidden * (FP32 + precision.stream) + 2 * FP32  # input, normalised, 1 / rms
    inputs = (5 if precision.casts else 2) * shape.hidden  # of q, k, v, and of gate and up
    attention = 2 * inner + 2 * kv  # q, its output, k, v
    feed_forward = 4 * shape.ffn  # gate, silu of it, up, their product
    extra = 0 if plain else inner
    kept = (inputs + attention + feed_forward + extra) * precision.linear
    return norms + kept + FP32 * shape.heads  # log-sum-exp


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


def plain_logits(shape: Shape, tokens: int) -> int:
    """Bytes of logits that training without groundkern or a fused loss keeps: 2 of their own dtype,
    4 of their fp32 copy and 4 of its log-softmax.

    Args:
        shape: of the model.
        tokens: of a process in one forward pass.
    """
    return tokens * shape.vocabulary * (2 + 4 + 4)


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA on every linear layer of the decoder, the default of `model.lora`.

    Args:
        shape: of the model.
        rank: of the adapters.
    """
    d = shape.hidden // shape.heads
    inner, kv = shape.heads * d, shape.kv * d
    ends = 2 * (shape.hidden + inner) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.ffn)
    return rank * ends * shape.layers


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
