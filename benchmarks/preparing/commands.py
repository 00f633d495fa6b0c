"""What the commands without a model cost: CPU to start and for each sample, and peak memory.

`python -m benchmarks.preparing.commands` draws inputs of N samples and of 10 N, runs each command
on both as a process of its own, and prints

- the CPU seconds of `--help`, and those of a run that are not for samples ("start"),
- the CPU seconds of 1,000 samples, which are the difference of the two runs,
- the resident memory of the largest process at its peak, in MiB, for N and for 10 N,
- the CPU seconds of 10 N samples with two workers, as a multiple of those with one.

CPU is user and system time of all processes of a command: those whose parent has ended are handed
to this one, which waits for them. A new process counts the memory of the one that starts it, so
this one imports little. Status 1 if a command's memory is above the limit or not flat.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.preparing import command_inputs as inputs

LIMIT = 700.0  # MiB
FLAT = 1.1  # times the memory of N samples that 10 N may take
TIMES = 10
ADOPTS = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
TITLES = ("command", "--help", "start", "of 1,000", "MiB, N", "MiB, 10 N", "2 workers")


class Command(NamedTuple):
    """A command: its name in the table, what makes its input, N samples for each of its own."""

    name: str
    make: Callable[[Path, int], list[str]]
    share: int = 1
    workers: bool = True


COMMANDS = (
    Command("words (tesseract)", inputs.words, share=40),
    Command("render", inputs.render, share=4),
    Command("marks", inputs.marks),
    Command("phrases", inputs.phrases),
    Command("maps, drawn", inputs.drawn, share=2),
    Command("maps coco", inputs.coco),
    Command("maps yolo", inputs.yolo),
    Command("maps voc", inputs.voc),
    Command("maps cvat", inputs.cvat),
    Command("maps labelstudio", inputs.labelstudio),
    Command("maps labelme", inputs.labelme),
    Command("adapt chat", inputs.chat),
    Command("adapt squad", inputs.squad),
    Command("adapt funsd", inputs.funsd),
    Command("adapt sroie", inputs.sroie),
    Command("inspect", inputs.inspect, workers=False),
    Command("inspect, all shown", inputs.inspect_all, share=40, workers=False),
)


class Cost(NamedTuple):
    """CPU seconds of all processes of a run, and the peak of the largest one in MiB."""

    cpu: float
    peak: float


def cost(words: Sequence[str], log: Path) -> Cost:
    """Runs `groundkern` and everything it starts to the end.

    Args:
        words: the command.
        log: gets what it prints.

    Raises:
        RuntimeError: it failed.
    """
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    output = [(os.POSIX_SPAWN_OPEN, 1, str(log), write, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
    command = [sys.executable, "-m", "groundkern", *words]
    started = os.posix_spawn(sys.executable, command, os.environ, file_actions=output)
    cpu = peak = 0.0
    failed = False
    while True:
        try:
            process, status, used = os.wait4(-1, 0)
        except ChildProcessError:
            break
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss / 1024)
        failed |= process == started and status != 0
    if failed:
        raise RuntimeError(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    return Cost(cpu, peak)


class Row(NamedTuple):
    """What is known of a command; `twice` is None where it takes no workers."""

    command: Command
    count: int
    help: float
    small: Cost
    large: Cost
    twice: Cost | None

    @property
    def each(self) -> float:
        """CPU seconds of a sample."""
        return (self.large.cpu - self.small.cpu) / ((TIMES - 1) * self.count)

    @property
    def steady(self) -> bool:
        """Memory within the limit, and flat in the number of samples."""
        peak = self.large.peak
        return peak <= LIMIT and peak <= FLAT * self.small.peak

    def cells(self) -> list[str]:
        """What is printed."""
        start = max(0.0, self.small.cpu - self.count * self.each)
        seconds = [f"{value:.2f}" for value in (self.help, start, 1000 * self.each)]
        peaks = [f"{cost.peak:.0f}" for cost in (self.small, self.large)]
        twice = "" if self.twice is None else f"{self.twice.cpu / self.large.cpu:.2f} x"
        name = f"{self.command.name}, {self.count:,}"
        return [name, *seconds, *peaks, twice] + ([] if self.steady else ["not flat"])


def measure(command: Command, samples: int, folder: Path) -> Row:
    """All runs of one command.

    Args:
        command: which.
        samples: N, before the command's share.
        folder: for its inputs and outputs.
    """
    count = max(1, samples // command.share)
    log = folder / "log"
    costs: list[Cost] = []
    for size in (count, TIMES * count):
        place = folder / str(size)
        place.mkdir(parents=True)
        words = command.make(place, size)
        for workers in ("1", "2") if command.workers else ("",):
            options = ["--workers", workers] if workers else []
            output = str(place / f"out{workers}{'.jsonl' if workers else '.html'}")
            if workers != "2" or size > count:
                costs.append(cost([*words, *options, "--output", output], log))
    subject = words[: 2 if command.workers else 1]
    helped = cost([*subject, "--help"], log)
    return Row(command, count, helped.cpu, *costs, *([] if command.workers else [None]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing.commands")
    parser.description = "CPU and memory of the commands that need no model."
    parser.add_argument("--samples", type=int, default=1000, help="N")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="commands with one in their name")
    arguments = parser.parse_args()
    if ctypes.CDLL(None).prctl(ADOPTS, 1, 0, 0, 0):
        parser.error("expected Linux, where a process can adopt the children of its children")
    steady = True
    print(_line(TITLES))
    for command in COMMANDS:
        if arguments.only and not any(word in command.name for word in arguments.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(command, arguments.samples, Path(folder))
        steady &= row.steady
        print(_line(row.cells()), flush=True)
    return 0 if steady else 1


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<26}" + "".join(f"{cell:>11}" for cell in cells[1:])


if __name__ == "__main__":
    sys.exit(main())
