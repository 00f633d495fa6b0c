"""What a call of `make gpu` does, in which order, and how long each step may take.

A lent GPU is there for minutes, so what matters most comes first: what the card can do, whether the
kernels are right, what they cost, better tiles, then the tests, which run as far as time allows.
Compiling needs no GPU and runs beside the steps that do.
"""

from __future__ import annotations

from dataclasses import dataclass

LOST = 75  # exit status of a process whose device stopped answering
SECONDS = 420.0  # ten minutes, less the machine's start and the transfer of results
RESERVE = 6.0  # for the archive and the summary
START = 9.0  # guessed, of a process that imports torch and Triton and opens the device
PYTEST = ("-m", "pytest", "tests/ops", "tests/test_lse.py", "-v", "--tb=short", "--no-header")
PLUGINS = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu.supervising.pytest_lines")


@dataclass(frozen=True)
class Step:
    """A process of its own.

    limit: seconds, the process's start included. background: the next step does not wait.
    waits_for: the background step that must have ended before. command: arguments of python, if
    it is not a step of `benchmarks.gpu.steps.worker`. case_limit: seconds after which one case
    counts as hung.
    """

    name: str
    what: str
    limit: float
    background: bool = False
    waits_for: str = ""
    command: tuple[str, ...] = ()
    case_limit: float = 30.0


COMPILE = Step(
    "compile", "kernels of the next steps, by all cores", 50, background=True, case_limit=60
)
CEILINGS = Step("ceilings", "bandwidth, matmul rates, launch cost", 30)
SMOKE = Step("smoke", "every op at 1, 8 and 64 rows against fp64", 60, waits_for="compile")
COMPILE_TILES = Step(
    "compile_tiles",
    "kernels of the tile sweep",
    110,
    background=True,
    waits_for="compile",
    case_limit=120,
)
REPLAY = Step("replay", "attention by graph replay, kernel by kernel", 80, case_limit=20)
LOSS = Step("loss", "linear cross entropy beside each of its GEMMs", 45, case_limit=25)
TILES = Step(
    "tiles", "single kernels over tile sizes", 100, waits_for="compile_tiles", case_limit=60
)
TESTS = Step(
    "tests",
    "the GPU tests, 8 at a time",
    150,
    command=(*PYTEST, *PLUGINS, "-m", "gpu and not gpu_large", "-n", "8", "--timeout=60"),
)
TESTS_LARGE = Step(
    "tests_large",
    "tests that need the card for themselves",
    120,
    command=(*PYTEST, *PLUGINS, "-m", "gpu_large", "--timeout=60"),
)
PEERS = Step("peers", "other libraries and plain torch, interleaved with ours", 110, case_limit=60)
TRAINING = Step("training_step", "a step of the 7B shape at 8k tokens", 90, case_limit=80)

STEPS = {
    step.name: step
    for step in (COMPILE, CEILINGS, SMOKE, COMPILE_TILES, REPLAY, LOSS, TILES, TESTS, TESTS_LARGE)
    + (PEERS, TRAINING)
}
CALLS = {
    "first": (COMPILE, CEILINGS, COMPILE_TILES, SMOKE, REPLAY, LOSS, TILES, TESTS, TESTS_LARGE),
    "second": (COMPILE, CEILINGS, SMOKE, REPLAY, LOSS, PEERS, TRAINING, TESTS, TESTS_LARGE),
}
