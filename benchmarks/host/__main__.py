"""`python -m benchmarks.host`: host time that KLAL and SMAM add to each attention layer.

A small Qwen2.5-VL of attention layers runs forward and backward with and without `gk_` inputs, on
one thread, and nothing is launched (stand_in.py). The least time of each layer over many rounds,
the median over layers, less that of the same model without `gk_` inputs, is what a layer pays. How
many of torch's operators it calls for that comes from a profile. The breakdown comes from rounds of
its own: calls and microseconds of named functions, without the named ones that they call.

bf16 is what a GPU trains with, and costs one launch less (docs/trainers/compile.md); attention
alone then takes the CPU's time to compute, and not what a host pays for a GPU.

`--compiled` measures the two ops alone instead, in a loop over layers: eager, and compiled as one
graph, which takes half a minute before.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # read when the launchers are imported below

import torch

from benchmarks.host import layers
from benchmarks.host.breakdown import breakdown
from benchmarks.host.compiled import of_ops
from benchmarks.host.layers import WARM
from benchmarks.host.operators import operators
from benchmarks.host.stand_in import stand_in
from benchmarks.timing import machine
from groundkern.hf import Klal, Smam

DEPTH = 28  # layers
TERMS = {
    "KLAL": {"klal": Klal()},
    "SMAM": {"smam": Smam()},
    "KLAL + SMAM": {"klal": Klal(), "smam": Smam()},
}


def added(terms: dict, rounds: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Microseconds that supervision adds to a layer's forward and backward, and those of a layer
    without it."""
    with layers.steps(DEPTH, terms, dtype) as steps:
        least = {name: torch.tensor(torch.inf) for name in steps}
        for number in range(rounds + WARM):
            for name, step in steps.items():
                took = step()
                if number >= WARM:
                    least[name] = least[name].minimum(took)
    least = {name: x.median(1).values * 1e6 for name, x in least.items()}
    return (least["grounded"] - least["plain"]).tolist(), least["plain"].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", default="", help="terms whose name contains this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="the ops alone, and compiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    stamp = machine.stamp(layers.CPU)
    about = ", ".join(f"{name} {stamp[name]}" for name in ("python", "torch", "triton"))
    print(f"{stamp['processor']}, {about}; {DEPTH} layers, least of {args.rounds} rounds")
    with stand_in():
        if args.compiled:
            for name, (forward, backward) in of_ops(DEPTH, args.rounds, dtype).items():
                print(f"{name}: {forward:.0f} us a layer forward, {backward:.0f} backward")
            return
        for name, terms in TERMS.items():
            if args.only not in name:
                continue
            (forward, backward), plain = added(terms, args.rounds, dtype)
            print(f"{name}: {forward:.0f} us a layer forward, {backward:.0f} backward")
            print(f"  beside {plain[0]:.0f} and {plain[1]:.0f} us of attention alone")
            more, alone = operators(terms, dtype)
            print(f"  {more:.0f} of torch's operators, beside {alone:.0f} of attention alone")
            for line in breakdown(DEPTH, terms, args.rounds, dtype):
                print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
