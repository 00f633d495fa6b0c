"""FLOPs, memory traffic, peak memory and waves of the Triton loss, per shape.

A model, computed from sizes, of `forward_with_gradients` in the Triton kernels of linear cross
entropy, which run for a mean, a sum or a frozen head. Nothing here is measured. What any
implementation needs at least is in floors.py.
"""

from dataclasses import dataclass

from groundkern.head_gradients import NARROW_SUMS
from groundkern.row_blocks import logit_chunks

PROCESSORS = 132  # of an H100 or H200
TILE = (128, 256)  # rows and columns that one processor makes at a time in a large product


@dataclass(frozen=True)
class Head:
    """States [rows, dim] against a weight [vocabulary, dim]."""

    rows: int
    dim: int
    vocabulary: int
    itemsize: int = 2  # bytes of a state or weight
    trained: bool = True  # the weight has a gradient

    @property
    def states(self) -> int:
        return self.rows * self.dim

    @property
    def weights(self) -> int:
        return self.vocabulary * self.dim

    @property
    def logits(self) -> int:
        return self.rows * self.vocabulary

    @property
    def chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, self.itemsize, dim=self.dim)

    @property
    def summed(self) -> int:
        """Bytes of a number of dU while it is summed over chunks."""
        return self.itemsize if len(self.chunks) <= NARROW_SUMS else 4


def flops(head: Head) -> int:
    """Of the logits, of dh, and of dU if the weight is trained."""
    return (2 + head.trained) * 2 * head.logits * head.dim


def bytes_per_logit(head: Head) -> int:
    """Bytes of device memory that are moved for one logit: written by its product, read and
    overwritten by its gradient, which is read by one product or two. The second read by the row's
    program comes from the L2 cache."""
    return head.itemsize * (4 + head.trained)


def moved_bytes(head: Head) -> int:
    """Bytes that GEMMs and kernels read and write if only a row under way stays in cache. A GEMM
    reads each operand once."""
    size, chunks = head.itemsize, len(head.chunks)
    total = bytes_per_logit(head) * head.logits
    total += 2 * chunks * size * head.weights  # for the logits and for dh
    total += (2 + head.trained) * size * head.states  # h read, dh written, h read for dU
    if head.trained:
        total += (2 * chunks - 1) * head.summed * head.weights
        total += (head.summed + size) * head.weights if head.summed > size else 0
    return total


def extra_bytes(head: Head) -> int:
    """Peak memory beyond the arguments and a few numbers per row: one chunk's logits, dh and dU, in
    fp32 too if it is summed in that and then cast."""
    if not head.rows:
        return 0
    stride = -(-head.vocabulary // 64) * 64
    total = head.itemsize * (stride * head.chunks[0].stop + head.states)
    if head.trained:
        narrowed = head.summed > head.itemsize
        total += (head.summed + head.itemsize * narrowed) * head.weights
    return total


def tiles(rows: int, columns: int) -> int:
    """Of a product [rows, columns]."""
    return -(-rows // TILE[0]) * -(-columns // TILE[1])


def waves(rows: int, columns: int) -> int:
    """Rounds of a product's tiles over the processors."""
    return -(-tiles(rows, columns) // PROCESSORS)


def busy(rows: int, columns: int) -> float:
    """Share of the processors' time in which they have a tile."""
    return tiles(rows, columns) / (PROCESSORS * waves(rows, columns))
