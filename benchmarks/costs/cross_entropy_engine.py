"""FLOPs, memory traffic and peak memory of the Triton loss, per shape.

A model, computed from sizes, of `forward_with_gradients` in the Triton kernels of linear cross
entropy, which run for a mean, a sum or a frozen head. Nothing here is measured. What any
implementation needs at least is in floors.py.
"""

from dataclasses import dataclass

from groundkern.row_blocks import logit_chunks


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
    def narrow(self) -> bool:
        """Whether operands are 16-bit: then fp32 sums are cast to their dtype at the end."""
        return self.itemsize < 4

    @property
    def chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4 + self.itemsize)


def flops(head: Head) -> int:
    """Of the logits, of dh, and of dU if the weight is trained."""
    return (2 + head.trained) * 2 * head.logits * head.dim


def moved_bytes(head: Head) -> int:
    """Bytes that GEMMs and kernels read and write if nothing stays in cache. A GEMM reads each
    operand once."""
    size = head.itemsize
    chunks = len(head.chunks)
    weights = size * head.weights
    total = size * head.states + 8 * head.logits  # written, then read for the statistics
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

    One chunk's logits and their gradient; dh in fp32 and in its own dtype; dU, in fp32 too if it is
    summed over chunks and then cast.
    """
    if not head.rows:
        return 0
    total = (4 + head.itemsize) * head.vocabulary * head.chunks[0].stop
    total += (4 + head.narrow * head.itemsize) * head.states
    if head.trained:
        summed = head.narrow and len(head.chunks) > 1
        total += (head.itemsize + 4 * summed) * head.weights
    return total
