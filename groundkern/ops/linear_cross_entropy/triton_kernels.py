"""Linear cross entropy on Triton (CUDA, ROCm).

One chunk of rows at a time has its logits in memory, in fp32; torch does the GEMMs:

    logits = h U^T                      GEMM, fp32 output
    partial_kernel, combine_kernel      top, others, own of each row
    bag_kernel                          mean over the bag's other labels
    finish_kernel                       loss, log p(w), lse                       (forward)
    gradient_kernel, bag_gradient_kernel, GEMMs dh = dz U and dU += dz^T h        (backward)

`backward` makes logits and statistics again: four GEMMs for a trained weight, three for a frozen
one. `forward_with_gradients` needs one fewer; it is for an op that knows the upstream gradient up
to a factor. Smoothing reads the bag's labels where they lie in the logits: |Y| of V per row.

The host never waits for the device, so it never learns which rows are ignored: the kernels skip
them, the GEMMs do not. Callers with many ignored rows gather the counted ones first.

With a process group every rank has some rows of the weight. A rank's statistics look like those of
one span of the vocabulary, so the kernel that combines spans combines ranks too. There the host
waits once, for the sizes of the shards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from groundkern.ops.linear_cross_entropy import triton_row_kernels as kernels
from groundkern.ops.linear_cross_entropy.triton_row_kernels import IGNORED, MEAN, TILES
from groundkern.row_blocks import logit_chunks
from groundkern.tiles import INTERPRETED


def unsupported(hidden: Tensor, weight: Tensor, group: object) -> str | None:
    """Why triton cannot serve this call, in one sentence; None when it can."""
    if hidden.dtype == torch.float64:
        return "the kernels sum in fp32, which is too narrow for fp64"
    if hidden.device.type == "cpu" and not INTERPRETED:
        return "on CPU tensors the kernels run only under TRITON_INTERPRET=1"
    if hidden.device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {hidden.device.type} tensors"
    return None


class _Bags(NamedTuple):
    """Labels as columns of this rank's weight; those of a bag stand together."""

    labels: Tensor  # [T] int64
    offsets: Tensor  # [G + 1]
    index: Tensor  # [N]

    def unique(self) -> tuple[Tensor, Tensor]:
        """Labels sorted within each bag, and how often the bag holds each: 0 at later copies."""
        at = torch.arange(len(self.labels), device=self.labels.device)
        bag = torch.searchsorted(self.offsets[1:].contiguous(), at, right=True)
        labels, order = self.labels.sort(stable=True)
        bag, by_bag = bag[order].sort(stable=True)
        labels = labels[by_bag]
        first = torch.ones_like(labels, dtype=torch.bool)
        first[1:] = (labels[1:] != labels[:-1]) | (bag[1:] != bag[:-1])
        run = first.cumsum(0)
        copies = torch.searchsorted(run, run, right=True) - at
        return labels, (copies * first).float()


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

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    own: Tensor  # [N]
    bags: _Bags | None
    smoothing: float
    softcap: float
    group: dist.ProcessGroup | None
    first: Tensor | int  # id of this rank's first row of the weight
    widest: int  # rows of the weight on the rank that has most

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def spans(self) -> int:
        return triton.cdiv(self.vocabulary, TILES.columns)

    @property
    def flags(self) -> dict[str, bool]:
        return {"HAS_BIAS": self.bias is not None, "HAS_SOFTCAP": self.softcap > 0}

    def chunks(self, bytes_per_logit: int) -> Iterator[_Chunk]:
        """Rows a chunk at a time; the next chunk's logits overwrite the last one's."""
        pieces = logit_chunks(len(self.own), self.widest, bytes_per_logit)
        height = pieces[0].stop if pieces else 0
        buffer = _empty(self.hidden, height, self.vocabulary)
        for rows in pieces:
            hidden, own = self.hidden[rows], self.own[rows]
            logits = buffer[: len(own)]
            _matmul(hidden, self.weight.t(), out=logits)
            statistics, predicted = self._statistics(logits, own)
            chunk = _Chunk(rows, hidden, logits, own, statistics, predicted)
            self._read_bags(chunk)
            yield chunk

    def _statistics(self, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        n = len(own)
        parts = _empty(logits, 3, n, self.spans)
        ids = own.new_empty(n, self.spans)
        kernels.partial_kernel[(n * self.spans,)](
            logits,
            logits if self.bias is None else self.bias,
            own,
            parts,
            ids,
            n,
            self.vocabulary,
            self.spans,
            self.softcap,
            **self.flags,
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
        kernels.bag_kernel[(n,)](
            chunk.logits,
            chunk.logits if self.bias is None else self.bias,
            chunk.own,
            self.bags.labels,
            self.bags.offsets,
            self.bags.index[chunk.rows],
            chunk.statistics,
            n,
            self.vocabulary,
            self.softcap,
            **self.flags,
            BLOCK=TILES.labels,
        )
        if self.group is not None:
            dist.all_reduce(chunk.statistics[MEAN.value], group=self.group)


def _problem(
    hidden, weight, bias, target, ids, offsets, index, smoothing, ignore_index, softcap, group
) -> _Problem:
    process_group, first, widest = None, 0, weight.shape[0]
    if group:
        process_group = dist.distributed_c10d._resolve_process_group(group)
        rows = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
        shards = _gather(rows, process_group)
        first = shards[: dist.get_rank(process_group)].sum()
        widest = int(shards.max())  # a sync: all ranks must cut the rows alike
    bags = None
    if ids is not None and smoothing > 0:
        bags = _Bags((ids - first).contiguous(), offsets.contiguous(), index.contiguous())
    own = (target - first).masked_fill(target == ignore_index, IGNORED.value)
    bias = None if bias is None else bias.contiguous()
    shard = (process_group, first, widest)
    return _Problem(hidden, weight, bias, own, bags, smoothing, softcap, *shard)


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
    kernels.combine_kernel[(n,)](
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


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, log p(w), lse [N] and the likeliest id [N]; ignored rows: 0, 0, 0 and -1."""
    bags = (ids, offsets, bag_index)
    options = (smoothing, ignore_index, softcap, group)
    problem = _problem(hidden, weight, bias, target, *bags, *options)
    results = _Results(problem)
    for chunk in problem.chunks(4):
        results.add(chunk)
    return *results.rows, results.predicted


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    row_factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    train_weight: bool,
) -> tuple[Tensor | None, ...]:
    """`forward` and dhidden, dweight, dbias in three GEMMs, or two where the weight is frozen.

    With row_factor [N] the loss is the scalar sum of loss times row_factor; without, per row, and
    dhidden holds the gradient of each row's own loss.
    """
    bags = (ids, offsets, bag_index)
    options = (smoothing, ignore_index, softcap, "")
    problem = _problem(hidden, weight, bias, target, *bags, *options)
    results, gradients = _Results(problem), _Gradients(problem, train_weight, None)
    wide = _empty(hidden, len(target))
    dloss = torch.ones_like(wide) if row_factor is None else row_factor.to(wide.dtype)
    upstream = (dloss.contiguous(), *[torch.zeros_like(wide)] * 2)
    for chunk in problem.chunks(4 + hidden.element_size()):
        results.add(chunk)
        gradients.add(chunk, upstream)
    loss = results.rows[0] if row_factor is None else (results.rows[0] * dloss).sum()
    return loss, *results.rows[1:], results.predicted, *gradients.finish()


def backward(
    dloss: Tensor,
    dlog_prob: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    bag_index: Tensor | None,
    smoothing: float,
    ignore_index: int,
    softcap: float,
    group: str,
    train_weight: bool,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dhidden, dweight, dbias; dweight is added to `weight_grad` instead when that is given."""
    bags = (ids, offsets, bag_index)
    options = (smoothing, ignore_index, softcap, group)
    problem = _problem(hidden, weight, bias, target, *bags, *options)
    gradients = _Gradients(problem, train_weight, weight_grad)
    for chunk in problem.chunks(4 + hidden.element_size()):
        gradients.add(chunk, (dloss, dlog_prob, dlse))
    return gradients.finish()


def _logit_gradient(
    problem: _Problem,
    chunk: _Chunk,
    upstream: Sequence[Tensor],
    unique: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """out [n, V] in the operands' dtype: the gradient of h U^T; the logits stay as they are.

    Args:
        upstream: gradients of loss, log p(w) and lse, [n] each.
        unique: `_Bags.unique()`, where there are bags.
    """
    n, spans = len(chunk.own), problem.spans
    bias = chunk.logits if problem.bias is None else problem.bias
    start = (chunk.logits, bias, chunk.own)
    end = (chunk.statistics, *upstream, out, n, problem.vocabulary)
    scalars = (problem.smoothing, problem.softcap)
    kernels.gradient_kernel[(n * spans,)](
        *start, *end, spans, *scalars, **problem.flags, BLOCK=TILES.columns, num_warps=TILES.warps
    )
    if problem.bags is not None:
        bags = (*unique, problem.bags.offsets, problem.bags.index[chunk.rows])
        kernels.bag_gradient_kernel[(n,)](
            *start, *bags, *end, *scalars, **problem.flags, BLOCK=TILES.labels
        )


class _Results:
    """loss, log p(w), lse [N] in `rows`, and the likeliest id [N], filled chunk by chunk."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.rows = [_empty(problem.hidden, len(problem.own)) for _ in range(3)]
        self.predicted = torch.empty_like(problem.own)

    def add(self, chunk: _Chunk) -> None:
        n = len(chunk.own)
        kernels.finish_kernel[(triton.cdiv(n, TILES.rows),)](
            chunk.own,
            chunk.statistics,
            *[x[chunk.rows] for x in self.rows],
            n,
            self.problem.smoothing,
            BLOCK=TILES.rows,
        )
        self.predicted[chunk.rows] = chunk.predicted


class _Gradients:
    """dhidden, filled chunk by chunk, and dweight and dbias, summed over chunks."""

    def __init__(self, problem: _Problem, train_weight: bool, weight_grad: Tensor | None) -> None:
        self.problem, self.train_weight, self.weight_grad = problem, train_weight, weight_grad
        self.unique = None if problem.bags is None else problem.bags.unique()
        self.dhidden = _empty(problem.hidden, *problem.hidden.shape)
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        self.buffer: Tensor | None = None

    def add(self, chunk: _Chunk, upstream: Sequence[Tensor]) -> None:
        """upstream: gradients of loss, log p(w) and lse, [N] each."""
        problem = self.problem
        if self.buffer is None:  # the first chunk is the tallest
            self.buffer = problem.hidden.new_empty(chunk.logits.shape)
        dlogits = self.buffer[: len(chunk.own)]
        upstream = [x[chunk.rows] for x in upstream]
        _logit_gradient(problem, chunk, upstream, self.unique, out=dlogits)
        _matmul(dlogits, problem.weight, out=self.dhidden[chunk.rows])
        if self.weight_grad is not None:
            _matmul(dlogits.t(), chunk.hidden, out=self.weight_grad, add=True)
        elif self.train_weight and len(chunk.own) == len(problem.own):  # the only chunk
            self.dweight = dlogits.t() @ chunk.hidden
        elif self.train_weight:
            add = self.dweight is not None
            if not add:
                self.dweight = _empty(problem.weight, *problem.weight.shape)
            _matmul(dlogits.t(), chunk.hidden, out=self.dweight, add=add)
        if problem.bias is not None:
            part = dlogits.sum(0, dtype=torch.float32)
            self.dbias = part if self.dbias is None else self.dbias + part

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        problem, dweight, dbias = self.problem, self.dweight, self.dbias
        if problem.group is not None:
            dist.all_reduce(self.dhidden, group=problem.group)
        if self.train_weight and self.weight_grad is None:
            dweight = torch.zeros_like(problem.weight) if dweight is None else dweight
            dweight = dweight.to(problem.weight.dtype)
        if problem.bias is not None:
            dbias = torch.zeros_like(problem.bias) if dbias is None else dbias
            dbias = dbias.to(problem.bias.dtype)
        return self.dhidden.to(problem.hidden.dtype), dweight, dbias
