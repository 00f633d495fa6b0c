"""Random calls on 2, 3 and 4 gloo processes against one process:

python -m tests.parallel.random_calls --calls 1000 [--first 0] [--dtype float64] [--backend ...]

A call is one seed, with keys split and with heads split. Prints the worst errors, each relative to
the largest element of its tensor, or to 1 if that is smaller; fails if one is over the limit.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from tests.parallel.comparing import errors, one_process, split_heads, split_keys, whole
from tests.parallel.drawing import call
from tests.parallel.processes import start

WORLDS = (2, 3, 4)
LIMITS = {"float64": 1e-12, "float32": 1e-5}


def worst_errors(
    seeds: range, group: dist.ProcessGroup, dtype: torch.dtype, backend: str = "reference"
) -> dict[str, tuple[float, int]]:
    """(worst error, its seed) of each tensor, by way of splitting and name."""
    worst: dict[str, tuple[float, int]] = {}
    for seed in seeds:
        drawn = call(seed, dist.get_world_size(group))
        results, gradients = one_process(drawn, torch.float64, "reference")
        truth = {**results, **gradients}
        for split in (split_keys, split_heads):
            results, gradients = split(drawn, group, dtype, backend)
            found = errors(whole({**results, **gradients}, group), truth)
            for name, error in found.items():
                full = f"{split.__name__} {name}"
                worst[full] = max(worst.get(full, (-1.0, seed)), (error, seed))
    return worst


def main(calls: int, first: int, dtype: str, backend: str) -> None:
    """Every process: a share of the calls on each number of ranks."""
    rank, total = dist.get_rank(), {}
    for number, ranks in enumerate(WORLDS):
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            seeds = range(first + number, first + calls, len(WORLDS))
            found = worst_errors(seeds, group, getattr(torch, dtype), backend)
            for name, entry in found.items():
                total[name] = max(total.get(name, (-1.0, 0)), entry)
    if rank == 0:
        for name, (error, seed) in sorted(total.items()):
            print(f"{name:28s} {error:.1e} (seed {seed})", flush=True)
    over = {name: x for name, x in total.items() if not x[0] <= LIMITS[dtype]}
    assert not over, f"rank {rank}: over {LIMITS[dtype]}: {over}"
    print(f"rank {rank}: {calls} calls, worst {max(x[0] for x in total.values()):.1e}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dtype", choices=LIMITS, default="float64")
    parser.add_argument("--backend", default="reference")
    given = parser.parse_args()
    start(max(WORLDS), main, given.calls, given.first, given.dtype, given.backend)
