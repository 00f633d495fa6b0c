"""Processes that a benchmark starts: launched, watched, and gone when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = {  # what runs a module where there is no accelerator
    "fsdp2": "benchmarks.ranks.fsdp2_on_cpu",
    "zero3": "benchmarks.ranks.zero3_on_cpu",
}
MARK = "GROUNDKERN_BENCHMARK"  # in the environment of all processes that a benchmark starts


def launcher(strategy: str | None, ranks: int) -> list[str]:
    """The words in front of `MODULE WORDS` that start it on CPU processes.

    Args:
        strategy: ddp, fsdp2 or zero3, as examples/accelerate has them; None: one process.
        ranks: processes.
    """
    if strategy is None:
        return [sys.executable, "-m"]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    words += ["--config_file", f"examples/accelerate/{strategy}.yaml"]
    words += ["--num_processes", str(ranks), "-m"]
    return [*words, ON_CPU[strategy]] if strategy in ON_CPU else words


@contextmanager
def started(words: list[str], mark: Path, output: Path) -> Iterator[subprocess.Popen]:
    """A command of this repository, of which nothing is left when the block ends.

    Args:
        words: the command.
        mark: a path that tells the processes that it starts from all others.
        output: the file for what they print.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment[MARK] = str(mark)
    with output.open("w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            for pid in [process.pid, *marked(mark)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def end_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception does, so that `started` ends what it started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def marked(mark: Path) -> list[int]:
    """The processes that were started with a mark.

    Args:
        mark: the path.
    """
    entry, found = os.fsencode(f"{MARK}={mark}"), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "environ").read_bytes()  # empty when it has ended
            if entry in words.split(b"\0"):
                found.append(int(folder.name))
    return found


def told(output: Path, lines: int = 3) -> str:
    """What went wrong according to what was printed: the last lines that name an error.

    Args:
        output: the file that `started` filled.
        lines: at most.
    """
    text = output.read_text(errors="replace").splitlines()
    named = [line.strip() for line in text if "Error" in line or line.startswith("error:")]
    return " / ".join(named[-lines:])
