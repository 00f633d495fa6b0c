"""A module of the tests as CPU processes that import everything once, before they part: two, or
as many as FORKED says.

python -m tests.hf.forked MODULE WORDS

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

PROCESSES = int(os.environ.get("FORKED", "2"))


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _run(rank: int, module: str, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def main(module: str, *words: str) -> None:
    """Runs the module in each process; fails if one of them does."""
    importlib.import_module(module)
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(free_port())
    start_processes(_run, (module, list(words)), nprocs=PROCESSES, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
