"""What linear cross entropy must compute, move and hold, per shape: models, not measurements.

The floor is what no implementation can avoid; `moved_bytes` and `extra_bytes` describe the Triton
engine (groundkern/ops/linear_cross_entropy/triton_kernels.py). Forward plus backward throughout.
"""

from dataclasses import dataclass

from groundkern.row_blocks import logit_chunks


@dataclass(frozen=True)
class Machine:
    """Datasheet rates."""

    flops: float  # per second, dense matmuls of 16-bit operands
    bandwidth: float  # bytes per second


H200 = Machine(flops=989e12, bandwidth=4.8e12)


@dataclass(frozen=True)
class Head:
    """rows x dim states against vocabulary x dim weights."""

    rows: int
    dim: int
    vocabulary: int
    itemsize: int = 2  # bytes of a state or weight
    trained: bool = True  # the weight has a gradient

    @property
    def hidden_bytes(self) -> int:
        return self.rows * self.dim * self.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.vocabulary * self.dim * self.itemsize

    @property
    def logits(self) -> int:
        return self.rows * self.vocabulary

    @property
    def forward_chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4)

    @property
    def backward_chunks(self) -> list[slice]:
        return logit_chunks(self.rows, self.vocabulary, 4 + self.itemsize)


def gemm_flops(head: Head) -> int:
    """One matmul of rows x dim x vocabulary."""
    return 2 * head.logits * head.dim


def floor_flops(head: Head) -> int:
    """Logits, dh, and dU where the weight is trained."""
    return (2 + head.trained) * gemm_flops(head)


def engine_flops(head: Head) -> int:
    """The backward makes the logits again."""
    return floor_flops(head) + gemm_flops(head)


def floor_bytes(head: Head) -> int:
    """U read for the logits and for dh, dU written once; h read and dh written."""
    return (2 + head.trained) * head.weight_bytes + 2 * head.hidden_bytes


def moved_bytes(head: Head) -> int:
    """Bytes the engine's GEMMs and kernels read and write, when nothing stays in cache.

    A GEMM is counted as reading each operand once.
    """
    forward, backward = len(head.forward_chunks), len(head.backward_chunks)
    weight, states = head.weight_bytes, head.hidden_bytes
    statistics = 8 * head.logits  # written by the GEMM, read once
    total = forward * weight + states + statistics
    total += backward * weight + states + statistics
    total += (4 + head.itemsize) * head.logits  # gradient kernel
    total += head.itemsize * head.logits + backward * weight  # dh
    total += 4 * head.rows * head.dim + (head.itemsize != 4) * (4 * head.rows * head.dim + states)
    if head.trained:
        total += head.itemsize * head.logits + states
        total += weight if backward == 1 else _summed_weight_bytes(head, backward)
    return total


def _summed_weight_bytes(head: Head, chunks: int) -> int:
    """An fp32 sum over chunks, then one cast."""
    wide = 4 * head.vocabulary * head.dim
    return (2 * chunks - 1) * wide + (head.itemsize != 4) * (wide + head.weight_bytes)


def seconds(flops: float, moved: float, machine: Machine) -> float:
    """The longer of computing and moving, each at the datasheet's rate."""
    return max(flops / machine.flops, moved / machine.bandwidth)


def extra_bytes(head: Head) -> int:
    """Peak memory of the engine beyond its arguments and a few numbers per row.

    Logits and their gradient of one chunk, dh in fp32 and in its own dtype, dU (in fp32 too where
    it is summed over chunks).
    """
    if not head.rows:
        return 0
    forward = 4 * head.vocabulary * head.forward_chunks[0].stop
    backward = (4 + head.itemsize) * head.vocabulary * head.backward_chunks[0].stop
    cast = head.itemsize != 4
    backward += 4 * head.rows * head.dim + cast * head.hidden_bytes
    if head.trained:
        summed = cast and len(head.backward_chunks) > 1
        backward += head.weight_bytes + summed * 4 * head.vocabulary * head.dim
    return max(forward, backward)
