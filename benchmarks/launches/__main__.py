"""`python -m benchmarks.launches`: the kernels that a call launches on a GPU, counted without one.

For each call, forward and backward apart: Triton launches, matrix products (torch's GEMMs), and
torch's other kernels. benchmarks/counts.json has the numbers.
"""

import argparse
import json
import os
import sys

from benchmarks.launches.cases import CASES
from benchmarks.launches.counting import count, counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--json", action="store_true", help="the numbers, as counts.json has them")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read by the kernel modules, which the calls import
    if args.json:
        print(json.dumps(counts()))
        return
    for name, make in CASES.items():
        if args.only not in name:
            continue
        for way, found in count(make).items():
            print(f"{name}, {way}:")
            for kind, kernels in found._asdict().items():
                names = ", ".join(f"{n} {x}" if n > 1 else x for x, n in sorted(kernels.items()))
                print(f"  {kind:7}{sum(kernels.values()):4}  {names}")


if __name__ == "__main__":
    sys.exit(main())
