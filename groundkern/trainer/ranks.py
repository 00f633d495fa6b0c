"""The processes of a command under `torchrun`: who does what, where they wait, how they end.

A process whose work fails says so and ends; one that is killed just ends. The others notice when
they next need it, which takes seconds at most, and end with a sentence of their own (`RankError`).
None waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from groundkern.trainer.config import ConfigError
from groundkern.trainer.errors import RankError
from groundkern.trainer.stopping import Stopped

T = TypeVar("T")
DAYS = 30 * 86400.0  # seconds: a process waits as long as the others work
COLLECTIVES = 1800.0  # seconds that a collective may take, as ddp_timeout has it
_PAUSE = 0.02  # seconds between looks at whether all are there
_FAILED = "groundkern/failed"  # in the store: a process has ended, and has said why


@dataclass(frozen=True)
class Ranks:
    """This process among those of the command.

    Args:
        rank, size: its number and how many there are.
        local: its number on this machine.
        timeout: seconds that a process waits for the others.
        group: of torch.distributed, on the CPU; None: there is one process.
        store: what the processes found each other by.
        shared: so many processes, one behind the other, train on the same samples.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    timeout: float = DAYS
    group: Any = field(default=None, repr=False)
    store: Any = field(default=None, repr=False)
    shared: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that owns the files, gathers and reports."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """How many processes train on different samples."""
        return self.size // self.shared

    def of_readers(self, values: Sequence[T]) -> Sequence[T]:
        """What all processes have, once for those that have the same samples.

        Args:
            values: of all of them, in their order.
        """
        return values[:: self.shared]

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
            work = dist.barrier(group=self.group, async_op=True)
            until = time.monotonic() + self.timeout
            while not work.is_completed():  # in Python, so that Ctrl-C is heard
                if time.monotonic() > until:
                    raise RankError(
                        f"{self}: not every process came to {where} within {self.timeout:,.0f} "
                        "seconds; the same command continues"
                    )
                time.sleep(_PAUSE)
            work.wait()
        except RuntimeError:
            raise self._left(f" before {where}") from None

    def alone(self, make: Callable[[], T], where: str) -> T:
        """What the first process makes, in all of them; its error is theirs too.

        Args:
            make: called in the first process; the others wait.
            where: what they wait for, for the error.

        Raises:
            RankError: a process ended before.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except Exception as error:
                if not _travels(error):
                    raise
                outcome[1] = error
        self.wait(where)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, error = outcome
        if error is not None:
            raise error
        return value

    def gathered(self, value: T, where: str) -> list[T]:
        """The values of all processes, in their order.

        Args:
            value: this one's; plain values and arrays.
            where: for the error.

        Raises:
            RankError: a process ended before.
        """
        if self.size == 1:
            return [value]
        self.wait(where)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def highest(self, values: Sequence[int]) -> list[int]:
        """The highest of each of some numbers over all processes: one reduction."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

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

    @contextmanager
    def heard_once(self) -> Iterator[None]:
        """What is printed and logged inside the block is the first process's; errors are all's."""
        if self.first:
            yield
            return
        before = logging.root.manager.disable
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(before)

    def ending(self, error: Exception) -> Exception:
        """The error to end with; `told` says that another process says the same sentence.

        Args:
            error: what ended this process's work.
        """
        if of_a_collective(error):
            return self._left("")
        with suppress(RuntimeError):  # a store that is gone: every process speaks for itself
            if isinstance(error, Stopped) and not error.agreed and self.store.check([_FAILED]):
                return self._left("")
            if not isinstance(error, (RankError, Stopped)):
                self.store.set(_FAILED, str(self))
            name = hashlib.sha256(f"{type(error).__name__} {error}".encode()).hexdigest()
            error.told = self.store.add(f"groundkern/said/{name}", 1) > 1
        return error

    def _left(self, before: str) -> RankError:
        return RankError(
            f"{self}: another process ended{before} (its own message, if it had one, is above); "
            "the same command continues"
        )

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"


@contextmanager
def joined(
    timeout: float = DAYS, *, accelerator: bool = False, collectives: float = COLLECTIVES
) -> Iterator[Ranks]:
    """The processes that `torchrun` started, connected; a single one without it.

    Args:
        timeout: seconds that a process waits for the others.
        accelerator: whether they compute together: the default group then serves the accelerator
            too, and each process has its own.
        collectives: seconds that a collective of the default group may take.

    Raises:
        ConfigError: there are fewer accelerators than processes.
        RankError: they did not all start.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(timeout=timeout)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    ranks = _connected(Ranks(rank, size, local, timeout), accelerator, collectives)
    try:
        yield ranks
    except Exception as error:
        ended = ranks.ending(error)
        raise ended from (None if ended is not error else error.__cause__)
    dist.destroy_process_group()  # after an error the end of the process does it


def _connected(ranks: Ranks, accelerator: bool, collectives: float) -> Ranks:
    backend = "gloo"
    if accelerator and torch.accelerator.is_available():
        kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
        if ranks.local >= count:
            raise ConfigError(
                f"{ranks}: expected an accelerator for each process of a machine, got {count}"
            )
        torch.accelerator.set_device_index(ranks.local)
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        with _ended_at_once():
            store, rank, size = next(
                dist.rendezvous("env://", timeout=timedelta(seconds=ranks.timeout))
            )
            limit = timedelta(seconds=collectives)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RankError(f"{ranks}: the processes do not find each other: {reason}") from None
    return Ranks(ranks.rank, ranks.size, ranks.local, ranks.timeout, group, store)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Signals end the process at once inside the block, where no Python code would hear them."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def of_a_collective(error: Exception) -> bool:
    """Whether a process that is gone is the reason of an error.

    Args:
        error: of torch, which has a class of its own for some of them only.
    """
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return gloo or isinstance(error, dist.DistError)


def _travels(error: Exception) -> bool:
    """Whether an error can be sent to other processes."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False
