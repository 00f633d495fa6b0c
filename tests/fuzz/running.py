"""One input against one target: what it raised, how long it took, how much memory it left."""

from __future__ import annotations

import random
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.mutating import mutate
from tests.fuzz.target import Target, Wrong

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 10  # of the processor that one input may take; inputs have at most 64 KiB
MEGABYTES = 300  # by which one input (in the command: a round of them) may raise the process's peak
ROOM = 2 << 30  # bytes of address space beyond what the process has, for all inputs


def limit_memory() -> None:
    """Makes an input that wants gigabytes fail with a MemoryError instead of the machine's end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


@dataclass(frozen=True)
class Failure:
    """What is wrong, and a signature by which failures of one cause are told from others."""

    what: str
    signature: str
    data: bytes = field(repr=False)


class TooSlow(BaseException):
    """Raised by the alarm; not an `Exception`, so that no handler of a parser takes it."""


def peak() -> float:
    """The most memory that this process had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(target: Target, data: bytes, *, measured: bool = True) -> bool | Failure:
    """Whether the target took the input, or how it failed.

    Args:
        target, data: see `Target.run`.
        measured: look at the memory too, which takes longer than most inputs do.
    """
    least = peak() if measured else 0.0
    before = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged files
            taken = target.run(data)
    except TooSlow as error:
        return Failure(f"took more than {SECONDS} s, in {error}", "too slow", data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return _failure(error, data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if measured and peak() - least > MEGABYTES:
        return Failure(f"took {peak() - least:.0f} MB", "too large", data)
    return taken


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow("" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}")


def _failure(error: BaseException, data: bytes) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if not f.filename.endswith("fuzz/target.py")]
    ours = [f for f in frames if "/groundkern/" in f.filename]
    last = frames[-1] if isinstance(error, Wrong) or not ours else ours[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    kind = type(error).__name__
    said = str(error)
    return Failure(f"{kind} at {place}: {said[:400]}", f"{kind} {place}", data)


def drawn(target: Target, seed: int, number: int) -> bytes:
    """Input `number` of a target's stream `seed`; the seeds themselves are not among them."""
    return mutate(random.Random(f"{target.name} {seed} {number}"), target)


def corpus(target: Target) -> Iterator[tuple[str, bytes]]:
    """The committed cases of a target and its seeds, by name."""
    yield from target.seeds.items()
    for path in sorted((CORPUS / target.name).glob("*")):
        yield path.name, path.read_bytes()


@dataclass
class Tally:
    """What became of a target's inputs."""

    inputs: int = 0
    taken: int = 0
    seconds: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, result: bool | Failure) -> bool:
        """Counts a result; True for a failure of a kind not seen before."""
        self.inputs += 1
        if not isinstance(result, Failure):
            self.taken += result
            return False
        self.counts[result.signature] += 1
        new = result.signature not in self.failures
        known = self.failures.setdefault(result.signature, result)
        if len(result.data) < len(known.data):
            self.failures[result.signature] = result
        return new
