"""The checks on four forked gloo processes: python -m tests.parallel.ranks [NAMES]"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from tests import interpreter
from tests.parallel.checks import CHECKS, LONG, RANKS
from tests.parallel.processes import start


def main(names: list[str]) -> None:
    """Says which checks have passed, on all ranks."""
    for name in names:
        began = time.process_time()
        (CHECKS | LONG)[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {name} {time.process_time() - began:.2f}", flush=True)


if __name__ == "__main__":
    if "triton" in sys.argv and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.install()
    start(RANKS, main, sys.argv[1:] or list(CHECKS))
