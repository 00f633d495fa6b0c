"""Linear cross entropy on Triton (CUDA, ROCm): chunks, GEMMs, launches.

One chunk of rows at a time has its logits in memory, in the operands' dtype unless
`set_logit_dtype` says otherwise; torch does the GEMMs:

    logits = h U^T                        GEMM
    _row_kernel                           each row's results, and its gradient in the logits' place
    dh = dz U and dU = dz^T h             GEMMs

`backward` recomputes the logits: four GEMMs for a trained weight, three for a frozen one.
`forward_with_gradients` needs one fewer; it is for an op that knows the upstream gradient up to a
factor.

The host never waits for the device, so it never learns which rows are ignored: the kernels skip
them, the GEMMs do not. Callers with many ignored rows gather the counted ones first.

With a process group every rank has some rows of the weight; `_statistics_kernel` reads them, and
`_row_kernel` combines what all ranks found. There the host waits once, for the sizes of the shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from groundkern import head_kernels, tiles
from groundkern.head_gradients import Summed
from groundkern.head_kernels import Logits, largest
from groundkern.head_products import Shard, gathered, matmul
from groundkern.head_statistics_kernels import Shards
from groundkern.ops import linear_cross_entropy as ce
from groundkern.ops.linear_cross_entropy import triton_kernels as kernels
from groundkern.ops.linear_cross_entropy.triton_kernels import Lists
from groundkern.row_blocks import logit_chunks, logit_dtype
from groundkern.tiles import processors


@dataclass(frozen=True)
class Tiles:
    columns: int  # vocabulary entries per step of a row's program
    least: int  # the same for a row that reads or sums much besides its logits
    labels: int  # of a list, per step
    warps: int  # of a row's program, but of a short row; the others use Triton's default


# Untuned first guess for every device: no measurement stands behind it. A step of 8192 entries in
# 16 bits is 16 KiB, three of which are loaded while one is computed: 48 KiB for each processor,
# where 23 KiB of loads in flight fill an H200's memory at a latency of 0.7 us. With 16 warps a
# thread has 16 of the entries; 32 spill, and fewer fit beside a bias, an entropy, a softcap, a
# share for every label: each of these halves the step.
TILES = Tiles(columns=8192, least=2048, labels=128, warps=16)
SMALL_TILES = Tiles(columns=4096, least=1024, labels=128, warps=16)  # of `tiles.small` devices

scaled = head_kernels.scaled


def unsupported(inputs: ce.Inputs, group: object) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return head_kernels.unsupported(inputs.hidden)


def _sorted_lists(labels: ce.Labels) -> Lists:
    """The lists with their labels sorted and each label's copies together at one of them."""
    _, _, ids, weights, offsets, index, _ = labels
    if ids is None:
        return Lists()
    at = torch.arange(len(ids), device=ids.device)
    of = torch.searchsorted(offsets[1:], at, right=True)
    # The list above the label; a label beyond 32 bits, which is none, may not reach another list.
    key, order = (of * 2**32 + ids.clamp(-1, 2**31)).sort()
    begin, end = (torch.searchsorted(key, key, right=right) for right in (False, True))
    copies = ((end - begin) * (at == begin)).float()
    if weights is None:
        sums, copies = copies, None
    else:
        # Whole numbers of 2^-40: their sums are exact, whatever the order.
        units = (weights[order].double() * 2.0**40).long()
        total = torch.nn.functional.pad(units.cumsum(0), (1, 0))
        sums = ((total[end] - total[begin]).double() * 2.0**-40 * (at == begin)).float()
    ids = key & 0xFFFFFFFF
    return Lists(ids, sums, copies, offsets, index)


@dataclass(frozen=True)
class _Problem:
    """What all chunks share."""

    inputs: ce.Inputs
    labels: ce.Labels
    options: ce.Options
    shard: Shard
    lists: Lists

    @classmethod
    def of(cls, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> "_Problem":
        hidden, weight, bias = inputs
        shard = Shard.of(weight, options.group)
        labels = ce.Labels(*(None if x is None else x.contiguous() for x in labels))
        inputs = ce.Inputs(hidden, weight, None if bias is None else bias.contiguous())
        return cls(inputs, labels, options, shard, _sorted_lists(labels))

    @property
    def device(self) -> torch.device:
        return self.inputs.hidden.device

    @property
    def tiles(self) -> Tiles:
        return SMALL_TILES if tiles.small(self.device) else TILES

    def chunks(self, gradients: bool) -> list[slice]:
        """Rows whose logits (and their gradient, where it has memory of its own) are in memory at a
        time."""
        hidden = self.inputs.hidden
        size = logit_dtype(hidden.dtype).itemsize
        if gradients and size != hidden.element_size():
            size += hidden.element_size()
        own = None if self.shard.group is None else 132  # all ranks must cut alike
        return logit_chunks(
            len(self.labels.target),
            self.shard.widest,
            size,
            dim=hidden.shape[1],
            processors=own or processors(self.device),
        )

    def logits(self, pieces: list[slice]) -> Iterator[tuple[slice, Logits]]:
        """Of one chunk after the other, which overwrite each other. The rows of a chunk begin at
        multiples of 128 bytes, so that they are loaded in wide pieces."""
        hidden, weight, bias = self.inputs
        vocabulary, softcap = weight.shape[0], self.options.softcap or None
        stride = -(-vocabulary // 64) * 64
        tallest = pieces[0].stop if pieces else 0
        buffer = hidden.new_empty(tallest, stride, dtype=logit_dtype(hidden.dtype))
        for rows in pieces:
            x = buffer[: rows.stop - rows.start]
            matmul(hidden[rows], weight.t(), out=x[:, :vocabulary])
            sharpness = 1.0 / self.options.temperature
            yield rows, Logits(x, bias, softcap, sharpness, stride, vocabulary)

    def targets(self, rows: slice) -> kernels.Targets:
        labels, options, first = self.labels, self.options, self.shard.first
        smoothed = options.label_smoothing > 0
        c = labels.class_weight
        if c is not None:
            c = c[first : first + self.inputs.weight.shape[0]]
        return kernels.Targets(
            labels.target[rows],
            options.ignore_index,
            first,
            None if labels.own is None else labels.own[rows],
            c,
            options.smoothing if options.smoothing > 0 else None,
            1.0 - options.label_smoothing,
            options.label_smoothing / self.shard.vocabulary if smoothed else None,
            options.z_loss,
        )

    def run(
        self,
        rows: slice,
        z: Logits,
        results: kernels.Results,
        upstream: kernels.Upstream,
        dlogits: Tensor | None,
    ) -> None:
        """The rows' results, and the gradient of their logits in `dlogits`, which may be z's."""
        targets, lists, n = self.targets(rows), self.lists, rows.stop - rows.start
        if lists.labels is not None:
            lists = lists._replace(index=lists.index[rows])
        shards = Shards()
        if self.shard.group is not None:
            shards = self._shards(z, targets, lists)
        programs = min(n, processors(self.device))
        longest, stash = 0, None
        if lists.labels is not None and dlogits is not None:
            longest = len(lists.labels)
            if self.options.smoothing == 0:  # every row has a list of its own, all of one length
                longest //= max(1, len(self.labels.target))
            stash = _floats(z.x, programs, longest)
        kernels._row_kernel[programs,](
            z,
            targets,
            lists,
            shards,
            results,
            upstream,
            dlogits,
            stash,
            longest,
            n,
            ENTROPY=self.options.entropy,
            RANKS=triton.next_power_of_2(shards.ranks),
            LABELS=self.tiles.labels,
            **self._constants(z),
        )

    def _constants(self, z: Logits) -> dict[str, int]:
        """Of a kernel in which a program has a row."""
        options, of_device = self.options, self.tiles
        more = options.entropy, options.label_smoothing > 0, options.softcap > 0, z.bias is not None
        most = max(of_device.least, of_device.columns >> sum(more))
        columns = min(most, triton.next_power_of_2(z.V))
        warps = of_device.warps if columns == most else 4
        return {"BLOCK": columns, "num_warps": warps, **tiles.at_most(128)}

    def _shards(self, z: Logits, targets: kernels.Targets, lists: Lists) -> Shards:
        """What every rank's shard of the vocabulary holds."""
        group, n = self.shard.group, len(targets.label)
        parts, ids = _floats(z.x, 6, n), torch.empty_like(targets.label)
        programs = min(n, processors(self.device))
        kernels._statistics_kernel[programs,](
            z,
            targets,
            parts,
            ids,
            n,
            ENTROPY=self.options.entropy,
            **self._constants(z),
        )
        every = gathered(parts, group), gathered(ids + self.shard.first, group)
        shards = Shards(*every, None, dist.get_world_size(group))
        if lists.labels is None:
            return shards
        totals, ranks = _floats(z.x, n), triton.next_power_of_2(shards.ranks)
        kernels._list_kernel[n,](
            z, targets, lists, shards, totals, n, RANKS=ranks, BLOCK=self.tiles.labels
        )
        dist.all_reduce(totals, group=group)
        return shards._replace(totals=totals)

    def top(self, z: Logits, n: int) -> tuple[Tensor, Tensor]:
        """The largest logits [n, K] over the temperature, and their ids."""
        count, group = self.options.top_k, self.shard.group
        values, ids = largest(z, n, count)
        ids = torch.where(ids >= 0, ids + self.shard.first, ids)
        if group is None:
            return values, ids
        values, ids = (gathered(x, group).transpose(0, 1).flatten(1) for x in (values, ids))
        values, order = values.sort(dim=1, descending=True, stable=True)  # ranks have ids in order
        return values[:, :count], ids.gather(1, order[:, :count])


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def forward(inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> ce.Rows:
    problem = _Problem.of(inputs, labels, options)
    results = _Results(problem)
    for rows, z in problem.logits(problem.chunks(gradients=False)):
        problem.run(rows, z, results.of(rows, z), kernels.Upstream(), None)
    return results.finish()


def forward_with_gradients(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, ahead: ce.Ahead
) -> tuple[ce.Rows, ce.Gradients]:
    """Both in three GEMMs, or two if the weight is frozen.

    With row_factor [N] the loss is the scalar sum of loss times row_factor; without, per row, and
    dhidden holds the gradient of each row's own loss.
    """
    problem, (row_factor, train_weight) = _Problem.of(inputs, labels, options), ahead
    results, pieces = _Results(problem), problem.chunks(gradients=True)
    gradients = _Gradients(problem, ce.Head(train_weight, None), len(pieces))
    dloss = None if row_factor is None else row_factor.float().contiguous()
    upstream = kernels.Upstream(dloss)
    for rows, z in problem.logits(pieces):
        gradients.add(rows, z, results.of(rows, z), upstream)
    every = results.finish()
    if dloss is not None:
        every = every._replace(loss=(every.loss * dloss).sum())
    return every, gradients.sums.finish()


def backward(
    upstream: ce.Upstream, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, head: ce.Head
) -> ce.Gradients:
    """dweight is added to `weight_grad` instead of returned if that is given."""
    problem = _Problem.of(inputs, labels, options)
    pieces = problem.chunks(gradients=True)
    gradients = _Gradients(problem, head, len(pieces))
    for rows, z in problem.logits(pieces):
        gradients.add(rows, z, kernels.Results(), kernels.Upstream(*upstream))
    return gradients.sums.finish()


class _Results:
    """`Rows`, filled chunk by chunk."""

    def __init__(self, problem: _Problem) -> None:
        self.problem, (hidden, *_) = problem, problem.inputs
        target, options = problem.labels.target, problem.options
        count, top_k = len(target), options.top_k
        floats = [_floats(hidden, count) for _ in range(3 + options.entropy)]
        entropy = floats[3] if options.entropy else None
        self.rows = kernels.Results(*floats[:3], entropy, torch.empty_like(target))
        self.top = None
        if top_k > 0:
            self.top = _floats(hidden, count, top_k), target.new_empty(count, top_k)

    def of(self, rows: slice, z: Logits) -> kernels.Results:
        """Where a chunk's results go; its likeliest labels are read here, before its logits are
        overwritten."""
        if self.top is not None:
            for x, part in zip(self.top, self.problem.top(z, len(z.x)), strict=True):
                x[rows] = part
        return kernels.Results(*(None if x is None else x[rows] for x in self.rows))

    def finish(self) -> ce.Rows:
        if self.top is None:
            return ce.Rows(*self.rows, None, None)
        (values, ids), problem = self.top, self.problem
        counted = problem.labels.target != problem.options.ignore_index
        ids = torch.where(counted[:, None], ids, -1)
        values = torch.where(counted[:, None], values - self.rows.lse[:, None], 0.0)
        return ce.Rows(*self.rows, ids, values)


class _Gradients:
    """What `Summed` sums, chunk by chunk."""

    def __init__(self, problem: _Problem, head: ce.Head, chunks: int) -> None:
        self.problem, group = problem, problem.shard.group
        self.sums = Summed(*problem.inputs, **head._asdict(), chunks=chunks, group=group)
        self.buffer: Tensor | None = None

    def add(
        self, rows: slice, z: Logits, results: kernels.Results, above: kernels.Upstream
    ) -> None:
        hidden, dlogits = self.problem.inputs.hidden, z.x
        if dlogits.dtype != hidden.dtype:
            if self.buffer is None:  # the first chunk is the tallest
                self.buffer = hidden.new_empty(dlogits.shape)
            dlogits = self.buffer[: len(z.x)]
        upstream = kernels.Upstream(*(None if x is None else x[rows] for x in above))
        self.problem.run(rows, z, results, upstream, dlogits)
        self.sums.add(rows, hidden[rows], dlogits[:, : z.V])
