"""Linear cross entropy on Triton (CUDA, ROCm): chunks, GEMMs, launches.

One chunk of rows at a time has its logits in memory, in fp32; torch does the GEMMs:

    logits = h U^T                        GEMM, fp32 output
    _partial_kernel, _combine_kernel      top, others, own of each row
    _bag_kernel                           mean over the bag's other labels
    _finish_kernel                        loss, log p(w), lse                       (forward)
    _gradient_kernel, _bag_gradient_kernel, GEMMs dh = dz U and dU += dz^T h        (backward)

`backward` recomputes logits and statistics: four GEMMs for a trained weight, three for a frozen
one. `forward_with_gradients` needs one fewer; it is for an op that knows the upstream gradient up
to a factor. Smoothing reads the bag's labels in the logits: |Y| of V per row.

The host never waits for the device, so it never learns which rows are ignored: the kernels skip
them, the GEMMs do not. Callers with many ignored rows gather the counted ones first.

With a process group every rank has some rows of the weight. A rank's statistics look like those of
one block of the vocabulary, so the kernel that combines blocks combines ranks too. There the host
waits once, for the sizes of the shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from groundkern.ops import linear_cross_entropy as ce
from groundkern.ops.linear_cross_entropy import triton_kernels as kernels
from groundkern.ops.linear_cross_entropy.triton_kernels import IGNORED, MEAN, Bags, Logits
from groundkern.row_blocks import logit_chunks
from groundkern.tiles import INTERPRETED


@dataclass(frozen=True)
class Tiles:
    columns: int  # vocabulary entries of one program
    labels: int  # of a bag, per step
    rows: int  # of one program of `_finish_kernel`
    warps: int  # of the programs over columns; the others use Triton's default


# Untuned first guess for every device: no measurement stands behind it.
TILES = Tiles(columns=8192, labels=128, rows=128, warps=8)


def unsupported(inputs: ce.Inputs, group: object) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return "its kernels are being rewritten"
    hidden = inputs.hidden
    if hidden.dtype == torch.float64:
        return "the kernels sum in fp32, which is too narrow for fp64"
    if hidden.device.type == "cpu" and not INTERPRETED:
        return "on CPU tensors the kernels run only under TRITON_INTERPRET=1"
    if hidden.device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {hidden.device.type} tensors"
    return None


def _sorted_bags(bags: Bags) -> Bags:
    """ce.Labels sorted within each bag, and how often the bag has each: 0 at later copies."""
    at = torch.arange(len(bags.labels), device=bags.labels.device)
    bag = torch.searchsorted(bags.offsets[1:].contiguous(), at, right=True)
    labels, order = bags.labels.sort(stable=True)
    bag, by_bag = bag[order].sort(stable=True)
    labels = labels[by_bag]
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = (labels[1:] != labels[:-1]) | (bag[1:] != bag[:-1])
    run = first.cumsum(0)
    copies = torch.searchsorted(run, run, right=True) - at
    return Bags(labels, (copies * first).float(), bags.offsets)


class _Chunk(NamedTuple):
    """Some rows with their logits in memory."""

    rows: slice
    hidden: Tensor  # [n, D]
    logits: Tensor  # [n, V] fp32, before bias and softcap
    own: Tensor  # [n] int64: the label's column, or IGNORED
    statistics: Tensor  # [5, n] fp32
    predicted: Tensor  # [n] int64


@dataclass(frozen=True)
class _Problem:
    """What all chunks share."""

    inputs: ce.Inputs
    options: ce.Options
    own: Tensor  # int64 [N]: columns of this rank's weight
    bags: Bags | None
    index: Tensor | None  # int64 [N] from row to bag
    group: dist.ProcessGroup | None
    first: Tensor | int  # id of this rank's first row of the weight
    widest: int  # rows of the weight on the rank that has most

    @classmethod
    def of(cls, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> "_Problem":
        (hidden, weight, bias), (target, ids, offsets, index) = inputs, labels
        group, first, widest = None, 0, weight.shape[0]
        if options.group:
            group = dist.distributed_c10d._resolve_process_group(options.group)
            rows = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
            shards = _gather(rows, group)
            first = shards[: dist.get_rank(group)].sum()
            widest = int(shards.max())  # a sync: all ranks must cut the rows alike
        bags = None
        if ids is not None and options.smoothing > 0:
            bags = Bags((ids - first).contiguous(), None, offsets.contiguous())
        own = (target - first).masked_fill(target == options.ignore_index, IGNORED.value)
        index = None if bags is None else index.contiguous()
        inputs = ce.Inputs(hidden, weight, None if bias is None else bias.contiguous())
        return cls(inputs, options, own, bags, index, group, first, widest)

    @property
    def blocks(self) -> int:
        """Of the vocabulary."""
        return triton.cdiv(self.inputs.weight.shape[0], TILES.columns)

    def logits(self, x: Tensor) -> Logits:
        softcap, vocabulary = self.options.softcap or None, self.inputs.weight.shape[0]
        return Logits(x, self.inputs.bias, softcap, vocabulary)

    def chunks(self, bytes_per_logit: int) -> Iterator[_Chunk]:
        """ce.Rows a chunk at a time; the next chunk's logits overwrite the last one's."""
        hidden, weight, _ = self.inputs
        pieces = logit_chunks(len(self.own), self.widest, bytes_per_logit)
        height = pieces[0].stop if pieces else 0
        buffer = _empty(hidden, height, weight.shape[0])
        for rows in pieces:
            own = self.own[rows]
            logits = buffer[: len(own)]
            _matmul(hidden[rows], weight.t(), out=logits)
            statistics, predicted = self._statistics(logits, own)
            chunk = _Chunk(rows, hidden[rows], logits, own, statistics, predicted)
            self._read_bags(chunk)
            yield chunk

    def _statistics(self, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        n, blocks = len(own), self.blocks
        parts, ids = _empty(logits, 3, n, blocks), own.new_empty(n, blocks)
        kernels._partial_kernel[n * blocks,](
            self.logits(logits),
            own,
            parts,
            ids,
            n,
            blocks,
            BLOCK=TILES.columns,
            num_warps=TILES.warps,
        )
        statistics, predicted = _combine(parts, ids, own)
        if self.group is None:
            return statistics, predicted
        parts = _gather(statistics[:3], self.group).permute(1, 2, 0).contiguous()
        ids = _gather(predicted + self.first, self.group).t().contiguous()
        return _combine(parts, ids, own)

    def _read_bags(self, chunk: _Chunk) -> None:
        if self.bags is None:
            return
        n = len(chunk.own)
        kernels._bag_kernel[n,](
            self.logits(chunk.logits),
            self.bags,
            chunk.own,
            self.index[chunk.rows],
            chunk.statistics,
            n,
            BLOCK=TILES.labels,
        )
        if self.group is not None:
            dist.all_reduce(chunk.statistics[MEAN.value], group=self.group)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def _combine(parts: Tensor, ids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [5, n] and likeliest id [n] from parts [3, n, P] and ids [n, P]."""
    n, count = ids.shape
    statistics, predicted = _empty(parts, 5, n), torch.empty_like(own)
    kernels._combine_kernel[n,](
        parts, ids, own, statistics, predicted, n, count, BLOCK=triton.next_power_of_2(count)
    )
    return statistics, predicted


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b, summed and written in fp32 whatever the operands' dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()  # an upcast only under the interpreter
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def forward(inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> ce.Rows:
    problem = _Problem.of(inputs, labels, options)
    results = _Results(problem)
    for chunk in problem.chunks(4):
        results.add(chunk)
    return results.rows


def forward_with_gradients(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, ahead: ce.Ahead
) -> tuple[ce.Rows, ce.Gradients]:
    """Both in three GEMMs, or two if the weight is frozen.

    With row_factor [N] the loss is the scalar sum of loss times row_factor; without, per row, and
    dhidden holds the gradient of each row's own loss.
    """
    problem, (row_factor, train_weight) = _Problem.of(inputs, labels, options), ahead
    results, gradients = _Results(problem), _Summed(problem, ce.Head(train_weight, None))
    wide = _empty(inputs.hidden, len(labels.target))
    dloss = torch.ones_like(wide) if row_factor is None else row_factor.to(wide.dtype)
    zero = torch.zeros_like(wide)
    upstream = ce.Upstream(dloss.contiguous(), zero, zero)
    for chunk in problem.chunks(4 + inputs.hidden.element_size()):
        results.add(chunk)
        gradients.add(chunk, upstream)
    rows = results.rows
    if row_factor is not None:
        rows = rows._replace(loss=(rows.loss * dloss).sum())
    return rows, gradients.finish()


def backward(
    upstream: ce.Upstream, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, head: ce.Head
) -> ce.Gradients:
    """dweight is added to `weight_grad` instead of returned if that is given."""
    problem = _Problem.of(inputs, labels, options)
    gradients = _Summed(problem, head)
    for chunk in problem.chunks(4 + inputs.hidden.element_size()):
        gradients.add(chunk, upstream)
    return gradients.finish()


class _Results:
    """`Rows`, filled chunk by chunk."""

    def __init__(self, problem: _Problem) -> None:
        self.problem, own = problem, problem.own
        floats = [_empty(problem.inputs.hidden, len(own)) for _ in range(3)]
        self.rows = ce.Rows(*floats, torch.empty_like(own))

    def add(self, chunk: _Chunk) -> None:
        n = len(chunk.own)
        kernels._finish_kernel[triton.cdiv(n, TILES.rows),](
            chunk.own,
            chunk.statistics,
            *[x[chunk.rows] for x in self.rows[:3]],
            n,
            self.problem.options.smoothing,
            BLOCK=TILES.rows,
        )
        self.rows.predicted[chunk.rows] = chunk.predicted


class _Summed:
    """dhidden, filled chunk by chunk, and dweight and dbias, summed over chunks."""

    def __init__(self, problem: _Problem, head: ce.Head) -> None:
        self.problem, (self.train_weight, self.weight_grad) = problem, head
        self.bags = None if problem.bags is None else _sorted_bags(problem.bags)
        self.dhidden = _empty(problem.inputs.hidden, *problem.inputs.hidden.shape)
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        self.buffer: Tensor | None = None

    def add(self, chunk: _Chunk, upstream: ce.Upstream) -> None:
        hidden, weight, bias = self.problem.inputs
        if self.buffer is None:  # the first chunk is the tallest
            self.buffer = hidden.new_empty(chunk.logits.shape)
        dlogits = self.buffer[: len(chunk.own)]
        self._logit_gradient(chunk, ce.Upstream(*(x[chunk.rows] for x in upstream)), out=dlogits)
        _matmul(dlogits, weight, out=self.dhidden[chunk.rows])
        if self.weight_grad is not None:
            _matmul(dlogits.t(), chunk.hidden, out=self.weight_grad, add=True)
        elif self.train_weight and len(chunk.own) == len(self.problem.own):  # the only chunk
            self.dweight = dlogits.t() @ chunk.hidden
        elif self.train_weight:
            add = self.dweight is not None
            if not add:
                self.dweight = _empty(weight, *weight.shape)
            _matmul(dlogits.t(), chunk.hidden, out=self.dweight, add=add)
        if bias is not None:
            part = dlogits.sum(0, dtype=torch.float32)
            self.dbias = part if self.dbias is None else self.dbias + part

    def _logit_gradient(self, chunk: _Chunk, upstream: ce.Upstream, out: Tensor) -> None:
        """out [n, V] in the operands' dtype: the gradient of h U^T; the logits are not changed."""
        problem, n, blocks = self.problem, len(chunk.own), self.problem.blocks
        z, smoothing = problem.logits(chunk.logits), problem.options.smoothing
        kernels._gradient_kernel[n * blocks,](
            z,
            chunk.own,
            chunk.statistics,
            *upstream,
            out,
            n,
            blocks,
            smoothing,
            BLOCK=TILES.columns,
            num_warps=TILES.warps,
        )
        if self.bags is not None:
            kernels._bag_gradient_kernel[n,](
                z,
                self.bags,
                chunk.own,
                problem.index[chunk.rows],
                chunk.statistics,
                *upstream,
                out,
                n,
                smoothing,
                BLOCK=TILES.labels,
            )

    def finish(self) -> ce.Gradients:
        (hidden, weight, bias), dweight, dbias = self.problem.inputs, self.dweight, self.dbias
        if self.problem.group is not None:
            dist.all_reduce(self.dhidden, group=self.problem.group)
        if self.train_weight and self.weight_grad is None:
            dweight = torch.zeros_like(weight) if dweight is None else dweight
            dweight = dweight.to(weight.dtype)
        if bias is not None:
            dbias = (torch.zeros_like(bias) if dbias is None else dbias).to(bias.dtype)
        return ce.Gradients(self.dhidden.to(hidden.dtype), dweight, dbias)
