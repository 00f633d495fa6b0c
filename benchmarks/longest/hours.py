"""What a large corpus costs, on paper: FLOPs of a sample, and samples per GPU-hour.

FLOPs are counted from sizes, as `costs` does; a card's rate and how much of it training reaches are
assumptions, stated here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import problems
from benchmarks.longest.setting import PATCHES, Setting
from benchmarks.training_step.kept import parameters
from benchmarks.training_step.model import SHAPES

RATE = 989e12  # FLOP/s: dense bf16 products of an H100 or H200, by its data sheet
UTILISATION = 0.4  # of that, which training reaches: an assumption
IMAGE = 1280  # visual tokens of an image, for the vision tower's attention
FULL_ATTENTION = 4  # of its layers; the others look at windows of 64 patches
WINDOW = 64
TOKENS = (1024, 8192, 131_072)
SAMPLES = (10**6, 10**9)


class Flops(NamedTuple):
    """Of one sample, forward and backward."""

    decoder: float  # linear layers
    attention: float
    vision: float
    grounding: float  # side attention and maps in every layer, and the rows of the head

    @property
    def total(self) -> float:
        return sum(self)


def flops(shape: str, setting: Setting) -> Flops:
    """FLOPs of a training step on one sample; the vision tower is frozen.

    Args:
        shape: the name of the setting's shape, of `problems.MODELS`.
        setting: the step.
    """
    counted, sizes, tokens = parameters(setting.shape), setting.shape, setting.length
    again = 1 if setting.checkpointed else 0  # forward passes more
    weights = 1 if setting.lora is None else 0  # products more, for the weights' gradients
    decoder = 2 * counted.layer * counted.layers * tokens * (2 + weights + again)
    causal = 2 * float(tokens) ** 2 * sizes.heads * setting.head_dim * sizes.layers
    attention = causal * (1 + 2.5 + again)
    patches = setting.visual * PATCHES
    keys = FULL_ATTENTION * IMAGE * PATCHES + (sizes.vision_depth - FULL_ATTENTION) * WINDOW
    vision = patches * (2 * counted.vision + 4 * sizes.vision_width * keys)
    return Flops(decoder, attention, vision, grounding(shape, setting))


def grounding(shape: str, setting: Setting) -> float:
    """FLOPs of SMAM, DV-SFT and KLAL, and of the head on all counted rows.

    Args:
        shape: of `problems.MODELS`.
        setting: the step.
    """
    model, dtype, rows = problems.MODELS[shape], torch.bfloat16, setting.rows
    sizes = {"shape": shape, "keys": setting.tokens}
    side = problems.side_attention(model, dtype, rows=rows.side, **sizes)
    maps = problems.attention_map(model, dtype, rows=rows.map, columns=setting.visual, **sizes)
    head = problems.linear_cross_entropy(
        model, dtype, shape=shape, rows=rows.counted, trained=setting.lora is None
    )
    again = [x.floor("forward").flops for x in (side, maps)] if setting.checkpointed else []
    layer = sum((side.floor("full").flops, maps.floor("full").flops, *again))
    return layer * setting.shape.layers + head.floor("full").flops


def table(names: tuple[str, ...] = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")) -> list[str]:
    """Markdown: samples per GPU-hour, and GPU-hours of SAMPLES.

    Args:
        names: of models, in both `SHAPES` and `problems.MODELS`.
    """
    hours = " | ".join(f"GPU-hours for 10^{len(str(n)) - 1}" for n in SAMPLES)
    lines = [
        f"| model | tokens | TFLOP | of grounding | samples per GPU-hour | {hours} |",
        "|---|---|---|---|---|" + "---|" * len(SAMPLES),
    ]
    for name in names:
        for tokens in TOKENS:
            setting = Setting(SHAPES[name], "groundkern", tokens, checkpointed=True)
            found = flops(name, setting)
            an_hour = RATE * UTILISATION * 3600 / found.total
            cells = " | ".join(f"{count / an_hour:,.0f}" for count in SAMPLES)
            share = f"{100 * found.grounding / found.total:.2g} %"
            tera = f"{found.total / 1e12:,.0f}"
            lines.append(f"| {name} | {tokens:,} | {tera} | {share} | {an_hour:,.0f} | {cells} |")
    return lines
