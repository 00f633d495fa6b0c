"""What linear cross entropy should take on an H200: its products, its row kernel, its launches.

Computed from sizes (cross_entropy_engine.py) and from the instructions that the compiled kernel has
for a logit; nothing here is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.costs import cross_entropy_engine as engine
from benchmarks.costs.cross_entropy_engine import Head

# The shapes that issue and make gpu name: rows x hidden size x vocabulary.
SHAPES = (
    Head(512, 2048, 151_936),
    Head(1024, 4096, 128_256),
    Head(4096, 4096, 128_256),
    Head(137, 4096, 151_936, trained=False),
)
# Machine instructions of the loops of `_row_kernel`, of a thread with 16 logits (sm_90, Triton
# 3.7.1): the statistics and the gradient. tests/test_expected.py counts them again.
LOGITS = 16
INSTRUCTIONS = {"statistics": 173, "gradient": 137}
ISSUED = 4 * 32  # instructions of single threads that a processor issues in a clock


@dataclass(frozen=True)
class Assumed:
    """bandwidth in bytes/s, rate in FLOP/s, launch in s; memory: share of the bandwidth that the
    row kernel reaches; clock in Hz; issue: share of the clocks in which it issues."""

    bandwidth: float
    rate: float
    launch: float
    memory: float
    clock: float
    issue: float


@dataclass(frozen=True)
class LossTime:
    """Seconds."""

    head: Head
    products: float  # of all rows at once: what no one avoids
    ours: float  # of our chunks
    rows: float  # of the row kernel
    bound: str  # of the row kernel: "memory" or "issue"
    launches: float

    @property
    def total(self) -> float:
        return self.ours + self.rows + self.launches

    @property
    def ratio(self) -> float:
        return self.total / self.products


def name(head: Head) -> str:
    frozen = "" if head.trained else ", frozen"
    return f"{head.rows} x {head.dim} x {head.vocabulary}{frozen}"


def _product(rows: int, columns: int, inner: int, assumed: Assumed, size: int = 2) -> float:
    """A product [rows, inner] x [inner, columns]: its operations, or its bytes if those take
    longer. Few tiles are split along `inner`, so that all processors have some."""
    busy = engine.busy(rows, columns) if engine.tiles(rows, columns) >= engine.PROCESSORS else 1.0
    moved = size * (rows * inner + inner * columns + rows * columns)
    operations = 2 * rows * columns * inner / (assumed.rate * busy)
    return max(operations, moved / assumed.bandwidth)


def _products(head: Head, heights: list[int], assumed: Assumed) -> float:
    total = 0.0
    for at, height in enumerate(heights):
        total += _product(height, head.vocabulary, head.dim, assumed)
        total += _product(height, head.dim, head.vocabulary, assumed)
        if head.trained:
            total += _product(head.vocabulary, head.dim, height, assumed)
            total += (at > 0) * head.summed * head.weights / assumed.bandwidth
    return total


def _row_kernel(head: Head, heights: list[int], assumed: Assumed) -> tuple[float, str]:
    """Each logit read and overwritten once in device memory, and its instructions; processors take
    a row each, and in the last round some have none."""
    moved = 2 * head.itemsize * head.logits / (assumed.bandwidth * assumed.memory)
    rounds = sum(-(-height // engine.PROCESSORS) for height in heights)
    of_row = sum(INSTRUCTIONS.values()) * head.vocabulary / LOGITS
    issued = rounds * of_row / (ISSUED * assumed.issue * assumed.clock)
    return max((moved, "memory"), (issued, "issue"))


def loss_time(head: Head, launches: int, assumed: Assumed) -> LossTime:
    """launches: kernels of a step besides the products."""
    heights = [x.stop - x.start for x in head.chunks]
    of_all = _products(head, [head.rows], assumed)
    ours = _products(head, heights, assumed)
    rows, bound = _row_kernel(head, heights, assumed)
    return LossTime(head, of_all, ours, rows, bound, launches * assumed.launch)


def counted() -> Iterator[tuple[str, dict[str, int]]]:
    """Of each shape what counts.json holds besides its launches."""
    for head in SHAPES:
        height = head.chunks[0].stop
        yield (
            name(head),
            {
                "chunks": len(head.chunks),
                "bytes per logit": engine.bytes_per_logit(head),
                "waves of logits": engine.waves(height, head.vocabulary),
                "waves of dhidden": engine.waves(height, head.dim),
                "waves of dweight": engine.waves(head.vocabulary, head.dim) * head.trained,
            },
        )
