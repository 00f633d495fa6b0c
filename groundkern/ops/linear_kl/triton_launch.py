"""Linear KL on Triton (CUDA, ROCm): chunks, GEMMs, launches.

One chunk of rows at a time has both heads' logits in memory, in fp32; torch does the GEMMs:

    logits = h U^T of student and teacher       two GEMMs, fp32 output
    _row_kernel                                  loss, and dz in the student's dtype
    dh = dz U, dU += dz^T h                      two GEMMs, one if the weight is frozen

`backward` recomputes both heads' logits; `forward_with_gradients` does not, but is for an op that
knows the upstream gradient up to a factor. The host never waits for the device, so it never learns
which rows count: the kernel skips the others, the GEMMs do not.

With a process group every rank has some rows of both weights, and the three passes over a row are
launches of their own: `_statistics_kernel`, `_sums_kernel`, `_gradient_kernel`. In between, a few
numbers a row go around. There the host waits once, for the sizes of the shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import head_kernels
from groundkern.head_gradients import Summed
from groundkern.head_kernels import Logits
from groundkern.head_products import Shard, gathered, matmul
from groundkern.ops import linear_kl as kl
from groundkern.ops.linear_kl import triton_kernels as kernels
from groundkern.row_blocks import logit_chunks
from groundkern.tiles import at_most


class Tiles(NamedTuple):
    columns: int  # vocabulary entries of one step along a row
    warps: int


# Untuned first guess for every device: no measurement stands behind it.
TILES = Tiles(columns=1024, warps=4)
scaled = head_kernels.scaled
KINDS = {"forward": kernels.FORWARD, "reverse": kernels.REVERSE, "js": kernels.JS}


def unsupported(inputs: kl.Inputs, group: object) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return head_kernels.unsupported(inputs.hidden, inputs.teacher_hidden)


class _Chunk(NamedTuple):
    """Some rows with both heads' logits in memory."""

    rows: slice
    hidden: Tensor  # [n, D], 0 in rows that do not count
    student: Logits
    teacher: Logits
    counted: Tensor | None  # uint8 [n]


@dataclass(frozen=True)
class _Problem:
    """What all chunks share."""

    inputs: kl.Inputs
    counted: Tensor | None  # bool [N]
    options: kl.Options
    shard: Shard

    @classmethod
    def of(cls, inputs: kl.Inputs, rows: kl.Rows, options: kl.Options) -> "_Problem":
        biases = (None if x is None else x.contiguous() for x in (inputs.bias, inputs.teacher_bias))
        inputs = inputs._replace(**dict(zip(("bias", "teacher_bias"), biases, strict=True)))
        counted = None if rows.counted is None else rows.counted.contiguous()
        return cls(inputs, counted, options, Shard.of(inputs.weight, options.group))

    @property
    def constants(self) -> dict[str, object]:
        kind = KINDS[self.options.kind]
        options = {"num_warps": TILES.warps, **at_most(128)}
        return {"KIND": kind, "BLOCK": TILES.columns, **options}

    def pieces(self, bytes_per_logit: int) -> list[slice]:
        """Rows whose logits are in memory at a time."""
        return logit_chunks(len(self.inputs.hidden), self.shard.widest, bytes_per_logit)

    def chunks(self, pieces: list[slice]) -> Iterator[_Chunk]:
        """One after the other; the next chunk's logits overwrite the last one's."""
        of = self.inputs
        height, vocabulary = pieces[0].stop if pieces else 0, of.weight.shape[0]
        room = [_empty(of.hidden, height, vocabulary) for _ in range(2)]
        caps = (self.options.softcap or None, self.options.teacher_softcap or None)
        for rows in pieces:
            student, teacher = (x[: rows.stop - rows.start] for x in room)
            hidden, counted = of.hidden[rows], None
            if self.counted is not None:  # or NaN there reached dU, as 0 times NaN
                hidden = hidden.masked_fill(~self.counted[rows, None], 0.0)
                counted = self.counted[rows].view(torch.uint8)
            matmul(hidden, of.weight.t(), out=student)
            matmul(of.teacher_hidden[rows], of.teacher_weight.t(), out=teacher)
            z = Logits(student, of.bias, caps[0], 1.0, vocabulary, vocabulary)
            t = Logits(teacher, of.teacher_bias, caps[1], 1.0, vocabulary, vocabulary)
            yield _Chunk(rows, hidden, z, t, counted)

    def compare(
        self, chunk: _Chunk, loss: Tensor, upstream: Tensor, out: Tensor | None = None
    ) -> None:
        """Fill the chunk's rows of loss [N]; fill `out` [n, V], the gradient of h U^T against
        upstream [N], if it is given."""
        loss, upstream = loss[chunk.rows], upstream[chunk.rows]
        options, of_chunk = self.options, (chunk.student, chunk.teacher, chunk.counted)
        if self.shard.group is not None:
            loss.copy_(self._compare_shards(chunk, upstream, out))
            return
        kernels._row_kernel[len(loss),](
            *of_chunk, upstream, loss, out, options.temperature, options.beta, **self.constants
        )

    def _compare_shards(self, chunk: _Chunk, upstream: Tensor, out: Tensor | None) -> Tensor:
        """`compare` of this rank's part of the vocabulary; returns the loss over all parts."""
        n, group = len(upstream), self.shard.group
        of_chunk = (chunk.student, chunk.teacher, chunk.counted)
        statistics, own = _empty(upstream, 5, n), upstream.new_empty((2, n), dtype=torch.int64)
        constants = self.constants
        kind, numbers = constants.pop("KIND"), (self.options.temperature, self.options.beta)
        kernels._statistics_kernel[n,](*of_chunk, statistics, own, n, numbers[0], **constants)
        statistics, own = _merged(
            gathered(statistics, group), gathered(own + self.shard.first, group)
        )
        known, sums = (statistics, (own - self.shard.first).contiguous()), _empty(upstream, 2, n)
        constants["KIND"] = kind
        kernels._sums_kernel[n,](*of_chunk, *known, sums, n, *numbers, **constants)
        dist.all_reduce(sums, group=group)
        if out is not None:
            kernels._gradient_kernel[n,](
                *of_chunk, *known, sums, upstream, out, n, *numbers, **constants
            )
        return sums[0]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _merged(parts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [5, n] and likeliest ids [2, n] over the vocabulary, from those of its parts
    [ranks, 5, n] and [ranks, 2, n]."""
    tops, others = parts[:, [0, 2]], parts[:, [1, 3]]
    top, rank = tops.max(0)  # [2, n]
    shift = torch.where(top == -torch.inf, 0.0, top)
    beaten = torch.arange(len(parts), device=parts.device)[:, None, None] != rank
    total = ((others + beaten) * (tops - shift).exp()).sum(0)
    at = parts[:, 4].gather(0, rank[:1])[0]
    statistics = torch.stack([top[0], total[0], top[1], total[1], at])
    return statistics, ids.gather(0, rank[None])[0]


def forward(inputs: kl.Inputs, rows: kl.Rows, options: kl.Options) -> Tensor:
    """Loss [N]."""
    problem = _Problem.of(inputs, rows, options)
    loss = _empty(inputs.hidden, len(inputs.hidden))
    for chunk in problem.chunks(problem.pieces(8)):
        problem.compare(chunk, loss, loss)
    return loss


def forward_with_gradients(
    inputs: kl.Inputs, rows: kl.Rows, options: kl.Options, ahead: kl.Ahead
) -> tuple[Tensor, kl.Gradients]:
    """Both in four GEMMs, or three if the weight is frozen.

    With row_factor [N] the loss is the scalar sum of loss times row_factor; without, per row, and
    dhidden holds the gradient of each row's own loss.
    """
    factor = ahead.row_factor
    upstream = torch.ones_like(inputs.hidden[:, 0], dtype=torch.float32)
    if factor is not None:
        upstream = factor.to(torch.float32).contiguous()
    loss, gradients = _gradients(upstream, inputs, rows, options, ahead.train_weight)
    return (loss if factor is None else (loss * upstream).sum()), gradients


def backward(
    upstream: kl.Upstream,
    inputs: kl.Inputs,
    rows: kl.Rows,
    options: kl.Options,
    train_weight: bool,
) -> kl.Gradients:
    return _gradients(upstream.dloss, inputs, rows, options, train_weight)[1]


def _gradients(
    upstream: Tensor,
    inputs: kl.Inputs,
    rows: kl.Rows,
    options: kl.Options,
    train_weight: bool,
) -> tuple[Tensor, kl.Gradients]:
    """Loss [N], and the gradients against upstream [N]."""
    problem, hidden = _Problem.of(inputs, rows, options), inputs.hidden
    loss, out = _empty(hidden, len(hidden)), None
    pieces, group = problem.pieces(8 + hidden.element_size()), problem.shard.group
    sums = Summed(*inputs[:3], train_weight=train_weight, chunks=len(pieces), group=group)
    for chunk in problem.chunks(pieces):
        if out is None:  # the first chunk is the tallest
            out = hidden.new_empty(chunk.student.x.shape)
        dlogits = out[: len(chunk.hidden)]
        problem.compare(chunk, loss, upstream, dlogits)
        sums.add(chunk.rows, chunk.hidden, dlogits)
    return loss, sums.finish()
