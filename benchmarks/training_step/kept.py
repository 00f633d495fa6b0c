"""What training keeps of a model: parameters, and a decoder layer's activations tensor by tensor.

Counted from sizes; `tests/test_arithmetic.py` compares the activations with what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.training_step.model import Shape, build

FP32 = 4


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


class LayerParts(NamedTuple):
    """Bytes per token that autograd keeps of one decoder layer."""

    norms: int  # the inputs, normalised, 1 / rms
    inputs: int  # of q, k and v, and of gate and up
    attention: int  # q, its output, log-sum-exp
    keys_values: int
    feed_forward: int  # gate, silu of it, up, their product

    @property
    def total(self) -> int:
        return sum(self)


def layer_parts(shape: Shape, precision: Precision, *, plain: bool = True) -> LayerParts:
    """What autograd keeps of one decoder layer without attention probabilities.

    Args:
        shape: of the model.
        precision: of `PRECISIONS`.
        plain: without side tokens, which keep the attention's output twice, alone and joined.
    """
    d = shape.hidden // shape.heads
    inner, kv = shape.heads * d, shape.kv * d
    return LayerParts(
        norms=2 * shape.hidden * (FP32 + precision.stream) + 2 * FP32,
        inputs=(5 if precision.casts else 2) * shape.hidden * precision.linear,
        attention=(2 if plain else 3) * inner * precision.linear + FP32 * shape.heads,
        keys_values=2 * kv * precision.linear,
        feed_forward=4 * shape.ffn * precision.linear,
    )


def layer_activations(shape: Shape, precision: Precision, *, plain: bool = True) -> int:
    """Bytes per token that autograd keeps of one decoder layer.

    Args:
        shape: of the model.
        precision: of `PRECISIONS`.
        plain: as in `layer_parts`.
    """
    return layer_parts(shape, precision, plain=plain).total


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
