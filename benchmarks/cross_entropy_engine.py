"""What the Triton engine of linear cross entropy computes, moves and holds, per shape.

A model of groundkern/ops/linear_cross_entropy/triton_kernels.py, forward plus backward, counted
from sizes; not a measurement of speed.
"""

from dataclasses import dataclass

from groundkern.row_blocks import logit_chunks


@dataclass(frozen=True)
class Head:
    """rows x dim states against vocabulary x dim weights."""

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
    def narrow(self) -> bool:
        """What is summed in fp32 is cast to the operands' dtype at the end."""
        return self.itemsize < 4

    @property
    def forward_chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4)

    @property
    def backward_chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4 + self.itemsize)


def flops(head: Head) -> int:
    """Logits twice, dh, and dU where the weight is trained."""
    return (3 + head.trained) * 2 * head.logits * head.dim


def moved_bytes(head: Head) -> int:
    """Bytes that GEMMs and kernels read and write when nothing stays in cache.

    A GEMM reads each operand once.
    """
    size = head.itemsize
    forward, backward = len(head.forward_chunks), len(head.backward_chunks)
    weights = size * head.weights
    logits = size * head.states + 8 * head.logits  # made, then read for the statistics
    total = 2 * logits + (forward + backward) * weights
    total += (4 + size) * head.logits  # gradient kernel
    total += size * head.logits + backward * weights + 4 * head.states  # dh
    total += head.narrow * (4 + size) * head.states
    if head.trained:
        total += size * (head.logits + head.states)
        total += weights if backward == 1 else (2 * backward - 1) * 4 * head.weights
        total += (backward > 1 and head.narrow) * (4 + size) * head.weights
    return total


def extra_bytes(head: Head) -> int:
    """Peak memory beyond the arguments and a few numbers per row.

    One chunk's logits and their gradient, dh in fp32 and in its own dtype, dU (in fp32 too where it
    is summed over chunks and then cast).
    """
    if not head.rows:
        return 0
    forward = 4 * head.vocabulary * head.forward_chunks[0].stop
    backward = (4 + head.itemsize) * head.vocabulary * head.backward_chunks[0].stop
    backward += (4 + head.narrow * head.itemsize) * head.states
    if head.trained:
        summed = head.narrow and len(head.backward_chunks) > 1
        backward += (head.itemsize + 4 * summed) * head.weights
    return max(forward, backward)
