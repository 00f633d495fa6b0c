"""What the Triton engine of linear cross entropy computes, moves and holds, per shape.

A model of `forward_with_gradients` in groundkern/ops/linear_cross_entropy/triton_kernels.py, which
a mean, a sum or a frozen head takes; counted from sizes, not a measurement of speed. What the
work needs at least, whatever the engine, is in floors.py.
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
    def chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4 + self.itemsize)


def flops(head: Head) -> int:
    """Logits, dh, and dU where the weight is trained."""
    return (2 + head.trained) * 2 * head.logits * head.dim


def moved_bytes(head: Head) -> int:
    """Bytes that GEMMs and kernels read and write when nothing stays in cache.

    A GEMM reads each operand once.
    """
    size = head.itemsize
    chunks = len(head.chunks)
    weights = size * head.weights
    total = size * head.states + 8 * head.logits  # made, then read for the statistics
    total += chunks * weights
    total += (4 + size) * head.logits  # gradient kernel
    total += size * head.logits + chunks * weights + 4 * head.states  # dh
    total += head.narrow * (4 + size) * head.states
    if head.trained:
        total += size * (head.logits + head.states)
        total += weights if chunks == 1 else (2 * chunks - 1) * 4 * head.weights
        total += (chunks > 1 and head.narrow) * (4 + size) * head.weights
    return total


def extra_bytes(head: Head) -> int:
    """Peak memory beyond the arguments and a few numbers per row.

    One chunk's logits and their gradient, dh in fp32 and in its own dtype, dU (in fp32 too where it
    is summed over chunks and then cast).
    """
    if not head.rows:
        return 0
    total = (4 + head.itemsize) * head.vocabulary * head.chunks[0].stop
    total += (4 + head.narrow * head.itemsize) * head.states
    if head.trained:
        summed = head.narrow and len(head.chunks) > 1
        total += (head.itemsize + 4 * summed) * head.weights
    return total
