"""What is learned with bfloat16 weights, and with what keeps small updates: `python -m
benchmarks.precision`.

A linear layer has to move its weights by about a tenth, in steps of the learning rate that
fine-tuning uses. Beside a weight, such a step is below half the distance of two bfloat16 numbers,
so an optimizer that rounds to the nearest one stays where it is. Optimizers are those of
`training.arguments.optim`; one whose package is missing says so.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

SIDE = 128  # a CPU without bfloat16 products takes seconds for these
BATCH = 32
SHIFT = 0.1  # of a weight's size


class Way(NamedTuple):
    """Weights and optimizer of a run."""

    title: str
    dtype: torch.dtype
    optim: str
    optim_args: str | None = None
    rank: int | None = None  # of fp32 adapters beside frozen weights


BF16 = torch.bfloat16
WAYS = (
    Way("fp32 weights, bf16 autocast", torch.float32, "adamw_torch"),
    Way("bf16 weights", BF16, "adamw_torch"),
    Way("bf16 weights", BF16, "adafactor"),
    Way("bf16 weights, 8-bit states", BF16, "adamw_8bit"),
    Way("bf16 weights, 8-bit states", BF16, "adamw_torch_8bit"),
    Way("the same, rounded at random", BF16, "adamw_torch_8bit", "bf16_stochastic_round=True"),
    Way("bf16 weights, fp32 adapters of rank 32", BF16, "adamw_torch", None, 32),
)


class Adapted(nn.Module):
    """A linear layer, with a low-rank fp32 adapter beside frozen weights if a rank is given."""

    def __init__(self, weight: Tensor, rank: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=rank is None)
        if rank is not None:
            self.a = nn.Parameter(torch.randn(rank, SIDE) / SIDE**0.5)
            self.b = nn.Parameter(torch.zeros(SIDE, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[B, SIDE] of [B, SIDE]."""
        y = x @ self.weight.T.to(x.dtype)
        return y if not hasattr(self, "a") else y + (x.float() @ self.a.T @ self.b.T).to(x.dtype)


def losses(way: Way, *, steps: int, rate: float) -> tuple[float, float]:
    """The mean squared error before and after training.

    Args:
        way: weights and optimizer.
        steps: of the optimizer.
        rate: the learning rate.

    Raises:
        ImportError, ValueError: the optimizer's package is missing.
    """
    torch.manual_seed(0)
    start = torch.randn(SIDE, SIDE) / SIDE**0.5
    signs = torch.randn(SIDE, 16) @ torch.randn(16, SIDE)
    target = start + SHIFT * start.abs().mean() * signs / signs.abs().mean()
    model = Adapted(start.to(way.dtype), way.rank)
    args = TrainingArguments("unused", optim=way.optim, optim_args=way.optim_args, use_cpu=True)
    args.learning_rate = rate
    kind, options = Trainer.get_optimizer_cls_and_kwargs(copy.copy(args), model)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    held_out = torch.randn(512, SIDE)
    wanted = held_out @ target.T
    before = _error(model, held_out, wanted)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        for _ in range(steps):
            x = torch.randn(BATCH, SIDE)
            with torch.autocast("cpu", BF16):
                y = model(x.bfloat16())
            (y.float() - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return before, _error(model, held_out, wanted)


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    return float((model(x.bfloat16()).float() - wanted).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2.5e-5)
    arguments = parser.parse_args()
    print("| weights | optim | loss before | loss after |")
    print("|---|---|---|---|")
    for way in WAYS:
        name = f"{way.optim}" + (f" {way.optim_args}" if way.optim_args else "")
        try:
            before, after = losses(way, steps=arguments.steps, rate=arguments.rate)
            print(f"| {way.title} | {name} | {before:.5f} | {after:.5f} |", flush=True)
        except (ImportError, ValueError) as error:
            print(f"| {way.title} | {name} | | {str(error).partition('.')[0]} |", flush=True)


if __name__ == "__main__":
    main()
