"""The output folder of a run: who holds it, its metrics, and what made them."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

METRICS, RECORD, REPORT, MODEL = "metrics.jsonl", "groundkern.json", "report.html", "model"
LOCK = "run.lock"
BEFORE, AFTER = "evaluation-before.json", "evaluation-after.json"
_NOT_LOSSES = (
    *("step", "steps", "epoch", "learning_rate", "nonfinite_steps"),
    *("samples_per_second", "tokens_per_second", "padding", "padding_unpacked"),
    *("num_input_tokens_seen", "train_tokens_per_second"),  # asked for by an argument
)
_NOT_LOSSES_BEGIN = ("grad_norm", "eval_")


@contextmanager
def held(output: Path, *, named: str = "`training.output`") -> Iterator[None]:
    """Holds a run's folder, which is made if it is missing, until the block or the process ends.

    Args:
        output: the folder.
        named: the setting that names it, for the errors.

    Raises:
        ConfigError: another process holds it, or it cannot be made.
    """
    try:
        durable.make_folder(output)
        lock = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"{named}: {output}: {error.strerror}") from None
    try:
        _claim(lock, output, named)
        yield
    finally:
        with suppress(OSError):
            os.close(lock)


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Tells processes that make the files of one folder which of them makes this one.

    Args:
        path: the file to be made; the lock is beside it and goes with the block.
        wait: for a process that makes it now.

    Yields:
        True if the file is this process's to make, until the block or the process ends. It may
        have been made meanwhile. On Windows always True: every process makes all files.

    Raises:
        StorageError: the disk has no locks, or the folder cannot be written.
    """
    if fcntl is None:
        yield True
        return
    name = path.with_name(f"{path.name}.lock")
    try:
        durable.make_folder(path.parent)
        lock = _locked(name)
        if lock is None and wait:
            print(f"Waiting for another process, which makes {path}", flush=True)
            lock = _locked(name, wait=True)
    except OSError as error:
        raise durable.cannot_write(name, error) from error
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            name.unlink()
        os.close(lock)


def _locked(name: Path, *, wait: bool = False) -> int | None:
    """A lock file, open and locked; None if another process holds it.

    Who held it before has removed it: who waited for that one makes another, which all others see.
    """
    while True:
        lock, there = os.open(name, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                there = os.path.samestat(os.fstat(lock), os.stat(name))
        except (BlockingIOError, PermissionError):
            return None
        finally:
            if not there:
                os.close(lock)
        if there:
            return lock


def _claim(lock: int, output: Path, named: str) -> None:
    """Lock an open file for this process, and say so in it."""
    try:  # a lock of the process: data workers, which outlive a killed one, do not have it
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        raise ConfigError(
            f"{named}: expected a folder that no other run uses, got {output}, held by {holder}"
        ) from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # it is held all the same
        os.truncate(lock, 0)
        text = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
        os.write(lock, text.encode())


def read_metrics(output: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last one that was cut off; none if there is no file."""
    return durable.read_rows(
        output / METRICS, lambda row: isinstance(row.get("step"), int), "row of metrics"
    )


def loss_terms(rows: list[dict]) -> list[str]:
    """The logged losses: the total, the text loss, then the others in the order they appear."""
    every = dict.fromkeys(name for row in rows for name in row)
    names = [n for n in every if n not in _NOT_LOSSES and not n.startswith(_NOT_LOSSES_BEGIN)]
    return sorted(names, key=lambda name: ("loss", "text", name).index(name))


def other_terms(rows: list[dict]) -> list[str]:
    """What is logged besides: figures of held-out samples alone, and norms of terms' gradients."""
    every = dict.fromkeys(name for row in rows for name in row)
    held_out = [n.removeprefix("eval_") for n in every if n.startswith("eval_")]
    norms = [n for n in every if n.startswith("grad_norm_")]
    return [n for n in (*held_out, *norms) if n not in loss_terms(rows)]


def keep_metrics(output: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl after `step`: training continues (or starts) from there."""
    rows = [json.dumps(row) + "\n" for row in read_metrics(output) if row["step"] <= step]
    durable.write_text(output / METRICS, "".join(rows))


def versions() -> dict[str, str]:
    """Version of each package that shapes a result."""
    found = {"python": platform.python_version()}
    for name in ("groundkern", "torch", "transformers", "accelerate", "peft", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> str:
    """The machine in words: processor, cores, accelerator."""
    import torch

    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if not torch.cuda.is_available():
        return cores
    return f"{cores}, {torch.cuda.get_device_name()}"
