"""The processes of one evaluation under `torchrun`: who takes what, and where they wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.config import ConfigError
from trainer.evaluation.errors import RankError

_PAUSE = 0.02  # seconds between looks at whether all are there


@dataclass(frozen=True)
class Ranks:
    """This process among those of the evaluation.

    Args:
        rank, size: its number and how many there are.
        local: its number on this machine.
        timeout: seconds that a process waits for the others.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    timeout: float = 7200.0

    @property
    def first(self) -> bool:
        """Whether this is the process that checks, gathers and reports."""
        return self.rank == 0

    def share(self, batches: Sequence) -> list:
        """Every N-th batch: no two processes have one in common."""
        return list(batches[self.rank :: self.size])

    def wait(self, where: str) -> None:
        """Returns when every process is here.

        Args:
            where: for the error: "the end of ...".

        Raises:
            RankError: one ended before, or did not come in time.
        """
        if self.size == 1:
            return
        try:
            work, until = dist.barrier(async_op=True), time.monotonic() + self.timeout
            while not work.is_completed():  # in Python, so that Ctrl-C is heard
                if time.monotonic() > until:
                    raise RankError(
                        f"{self}: not every process came to {where} within {self.timeout:,.0f} "
                        "seconds; the same command continues"
                    )
                time.sleep(_PAUSE)
            work.wait()
        except RuntimeError:
            raise RankError(
                f"{self}: another process ended before {where}, and says why itself; the same "
                "command continues"
            ) from None

    def device(self, wanted: str | None) -> torch.device:
        """The device that `--device` asks for; on an accelerator each process has its own.

        Raises:
            ConfigError: there is no such device.
        """
        if wanted is None:
            there = torch.accelerator.is_available()
            wanted = torch.accelerator.current_accelerator().type if there else "cpu"
        try:
            device = torch.device(wanted)
            if device.type != "cpu" and device.index is None and self.size > 1:
                device = torch.device(device.type, self.local)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"--device: {wanted} cannot be used: {reason}") from None
        return device

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The processes that `torchrun` started, connected; a single one without it.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        RankError: they did not all start.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(timeout=timeout)
        return
    ranks = Ranks(
        int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")), timeout=timeout
    )
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RankError(f"{ranks}: the processes do not find each other: {reason}") from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
