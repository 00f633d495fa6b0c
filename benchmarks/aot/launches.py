"""Which launches are compiled, and how many variants of them a training run would compile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from benchmarks.aot.calls import (
    TILE_TABLES,
    Sizes,
    attention_map,
    linear_cross_entropy,
    linear_kl,
    recorded,
    rows_taken,
    side_attention,
)
from benchmarks.aot.edges import MAPS, edges
from benchmarks.aot.recorder import GPUTarget, LabelledLaunch

DIMS = (40, 64, 72, 128, 192, 256)
SOFTCAPS = (0.0, 30.0)
# Of side attention: (sets, lse, softcap)
SIDES = tuple(product((True, False), (False, True), SOFTCAPS))
OF_SUBSET = ((True, False, 0.0), (True, True, 0.0))


def launches(subset: bool) -> Iterator[LabelledLaunch]:
    """Every kernel at every row of its tile table, then the edges. The subset: bf16 at head
    dimension 128."""
    dtypes = (torch.bfloat16,) if subset else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for dim, rows in product((128,) if subset else DIMS, row_counts()):
            sizes = Sizes(dim=dim, dtype=dtype, rows=rows)
            name = f"{sizes.name} D={dim}" + f" rows={rows}" * (rows != Sizes.rows)
            for sets, lse, softcap in OF_SUBSET if subset else SIDES:
                label = f"side_attention {name}{' sets' * sets}{' lse' * lse}"
                run = partial(side_attention, sizes, sets, lse, softcap)
                yield from recorded(label + " softcap" * (softcap > 0), run)
            for call, softcap in product(MAPS[:2], (0.0,)) if subset else product(MAPS, SOFTCAPS):
                label = f"attention_map {name} {' '.join(call)}{' softcap' * (softcap > 0)}"
                yield from recorded(label, partial(attention_map, sizes, *call, softcap))
        for dim in (128,) if subset else DIMS:
            run = partial(rows_taken, Sizes(dim=dim, dtype=dtype), True)
            yield from recorded(f"rows_taken {Sizes(dtype=dtype).name} D={dim}", run)
        for bias, softcap in ((False, 0.0),) if subset else ((False, 0.0), (True, 30.0)):
            sizes = Sizes(dtype=dtype)
            run = partial(linear_cross_entropy, sizes, bias, "bags", softcap)
            yield from recorded(f"linear_cross_entropy {sizes.name} softcap={softcap}", run)
            run = partial(linear_kl, sizes, "js", bias, True, softcap)
            yield from recorded(f"linear_kl {sizes.name} softcap={softcap}", run)
    yield from edges(subset)


def row_counts() -> list[int]:
    """Numbers of rows that reach every row of the tile tables."""
    group = Sizes.heads // Sizes.kv_heads
    buckets = {
        key[-1] for table, least in TILE_TABLES for key in table if len(key) > least
    }  # the largest packed rows (rows times group) of each bucket
    over = {max(buckets) // group + 1} if buckets else set()
    return sorted({Sizes.rows, *over, *(max(1, bucket // group) for bucket in buckets)})


class Variants(NamedTuple):
    """How many variants of one kernel are compiled, and the arguments in which they differ."""

    count: int
    of_one_size: int
    arguments: list[str]


def variants(gpu: GPUTarget, count: int = 60, seed: int = 0) -> dict[str, Variants]:
    """The variants of each kernel that steps of `count` random sizes compile.

    Rows, keys and key columns are random; the model's sizes are fixed: bf16, D = 128.
    """
    draw, keys, first = random.Random(seed), {}, {}
    for _ in range(count):
        many = draw.randint(1, 32_768)
        sizes = Sizes(rows=draw.randint(1, 2048), keys=many, columns=draw.randint(1, many))
        keys |= {launch.key(gpu): launch for launch in _step(sizes)}
        first = first or dict(keys)
    by_name: dict[str, list[LabelledLaunch]] = {}
    for launch in keys.values():
        by_name.setdefault(launch.name, []).append(launch)
    alone = Counter(launch.name for launch in first.values())
    return {
        name: Variants(len(found), alone[name], _differing(found, gpu))
        for name, found in sorted(by_name.items())
    }


def _step(sizes: Sizes) -> Iterator[LabelledLaunch]:
    """Forward and backward of every op."""
    runs = [partial(side_attention, sizes, True, lse, 0.0) for lse in (False, True)]
    runs += [partial(attention_map, sizes, *call, 0.0) for call in MAPS]
    runs += [partial(attention_map, sizes, "kl", "mean", "columns", 0.0, adds=True)]
    runs += [partial(rows_taken, sizes, side_tokens) for side_tokens in (True, False)]
    runs += [partial(linear_cross_entropy, sizes, False, "bags", 0.0)]
    runs += [partial(linear_kl, sizes, "js", False, True, 0.0)]
    for run in runs:
        yield from (launch for launch in recorded("", run) if launch.kind == "large")


def _differing(found: list[LabelledLaunch], gpu: GPUTarget) -> list[str]:
    """The arguments of a kernel that are specialised differently in different launches."""
    seen: dict[str, set[str]] = {}
    for launch in found:
        for name, how in leaves(launch, gpu):
            seen.setdefault(name, set()).add(how)
    return [name for name, ways in seen.items() if len(ways) > 1]


def leaves(launch: LabelledLaunch, gpu: GPUTarget) -> Iterator[tuple[str, str]]:
    """(name, type and specialisation) of each argument, and of each field of a NamedTuple."""
    bound, specialised, _ = launch.specialised(gpu)
    for name, (kind, how) in zip(bound, specialised, strict=True):
        yield from _leaves(name, kind, how)


def _leaves(name: str, kind: object, how: object) -> Iterator[tuple[str, str]]:
    if not isinstance(kind, tuple):
        yield name, f"{kind} {how}"
        return
    fields = getattr(kind, "_fields", range(len(kind)))
    for field, *parts in zip(fields, kind, how, strict=True):
        yield from _leaves(f"{name}.{field}", *parts)
