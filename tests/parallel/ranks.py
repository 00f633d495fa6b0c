"""The checks on four forked gloo processes: python -m tests.parallel.ranks [NAMES]"""

from __future__ import annotations

import sys
import time

import torch.distributed as dist

from tests.parallel.checks import CHECKS, RANKS
from tests.parallel.processes import start


def main(names: list[str]) -> None:
    """Says which checks have passed, on all ranks."""
    for name in names:
        began = time.process_time()
        CHECKS[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {name} {time.process_time() - began:.2f}", flush=True)


if __name__ == "__main__":
    start(RANKS, main, sys.argv[1:] or list(CHECKS))
