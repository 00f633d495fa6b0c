"""Forked gloo processes, which import everything once, before they part."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests.hf.forked import free_port

PATIENCE = timedelta(seconds=120)  # then a process that waits for others gives up


def start(processes: int, function: Callable, *arguments: object) -> None:
    """Run `function(*arguments)` in each of so many; fails if one of them does.

    Args:
        processes: how many.
        function: finds its rank in the default group.
        arguments: of the function.
    """
    words = processes, free_port(), function, arguments
    start_processes(_run, words, nprocs=processes, start_method="fork")


def _run(rank: int, processes: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=PATIENCE)
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
