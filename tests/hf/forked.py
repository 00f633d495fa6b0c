"""A module of the tests as two CPU processes, or N, that import everything once, before they part:

python -m tests.hf.forked [N] MODULE WORDS

For tests that are run often: torchrun has each process import torch and transformers anew, which
costs more than a small run does.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys

from torch.multiprocessing import start_processes


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _run(rank: int, module: str, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def main(module: str, *words: str, processes: int = 2) -> None:
    """Runs the module in each process; fails if one of them does."""
    importlib.import_module(module)
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(_free_port())
    start_processes(_run, (module, list(words)), nprocs=processes, start_method="fork")


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        main(*sys.argv[2:], processes=int(sys.argv[1]))
    else:
        main(*sys.argv[1:])
