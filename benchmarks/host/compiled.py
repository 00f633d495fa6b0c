"""Host time of the ops alone in a loop over layers: eager, and as one compiled graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.host.layers import DIM, HEADS, KV_HEADS, LENGTH, WARM
from groundkern import KeySets, QueryRows, attention_kl, side_attention

ROWS, COLUMNS = 16, 56


def of_ops(depth: int, rounds: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Least microseconds a layer, forward and backward, of side attention and a KL over columns."""
    loss, inputs = _loss_of(depth, dtype)
    runs = {"eager": loss, "torch.compile": torch.compile(loss, fullgraph=True)}
    return {name: _least(run, inputs, depth, rounds) for name, run in runs.items()}


def _loss_of(
    depth: int, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]:
    place = torch.arange(LENGTH - ROWS, LENGTH, dtype=torch.int32)
    first = torch.zeros_like(place)
    members = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    selection = first, place, first, place + 1, KeySets.from_bool(members, first).bits
    columns = torch.arange(COLUMNS, dtype=torch.int32)[None]
    target = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    shapes = (ROWS, HEADS, DIM), (1, KV_HEADS, LENGTH, DIM), (1, KV_HEADS, LENGTH, DIM)
    new = partial(torch.randn, dtype=dtype, requires_grad=True)
    inputs = [tuple(map(new, shapes)) for _ in range(depth)]

    def loss(layers: list[tuple[Tensor, ...]]) -> Tensor:
        *of_rows, bits = selection
        rows, allowed, total = QueryRows(*of_rows), KeySets(bits, first, LENGTH), 0.0
        for q, k, v in layers:
            side = side_attention(q, k, v, rows, allowed=allowed).out
            kl = attention_kl(q, k, target, rows, columns, allowed=allowed, over="columns")
            total = total + side.square().mean() + kl.mean()
        return total

    return loss, inputs


def _least(
    run: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]], depth: int, rounds: int
) -> tuple[float, float]:
    took = []
    for number in range(rounds + WARM):
        for x in (x for layer in inputs for x in layer):
            x.grad = None
        times = [time.perf_counter()]
        loss = run(inputs)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        if number >= WARM:
            took.append(torch.tensor(times, dtype=torch.float64).diff())
    forward, backward = (torch.stack(took).amin(0) / depth * 1e6).tolist()
    return forward, backward
