"""The specification of linear cross entropy, in plain torch.

       z_n  = softcap(U h_n + bias),   log p_n(y) = z_ny - lse_n,   lse_n = log sum_y exp(z_ny)
(D3)   L_n  = -(1 - b) log p_n(w_n) - b mean_{y in Y_n, y != w_n} log p_n(y)
       b = 0 if Y_n without w_n is empty

log p is formed as -log(1 + sum_{y != w} exp(z_y - z_w)): its gradient at the target is minus the
sum of the other probabilities, so p - 1 does not cancel as p -> 1.

With a process group the vocabulary is sharded over its ranks in rank order; every rank holds all
rows and gets the same results.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.ops import linear_cross_entropy as ce
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import BLOCK_ELEMENTS, vjp


@dataclass(frozen=True)
class _Shard:
    """This process's part of the vocabulary, and the sums over all parts."""

    first: int  # id of this shard's first row of the weight
    rows: int
    group: dist.ProcessGroup | None

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local index (clamped) of each id, and whether it is here."""
        local = ids - self.first
        return local.clamp(0, max(self.rows - 1, 0)), (local >= 0) & (local < self.rows)

    def sum(self, x: Tensor) -> Tensor:
        return x if self.group is None else _GroupSum.apply(x, self.group)

    def maximum(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Largest logit [n] and its id [n] over the whole vocabulary, without gradient."""
        value, index = z.detach().max(1)
        index = index + self.first
        if self.group is None:
            return value, index
        world = dist.get_world_size(self.group)
        values, indices = ([torch.empty_like(x) for _ in range(world)] for x in (value, index))
        dist.all_gather(values, value, group=self.group)
        dist.all_gather(indices, index, group=self.group)
        best, rank = torch.stack(values).max(0)
        return best, torch.stack(indices).gather(0, rank[None])[0]


class _GroupSum(torch.autograd.Function):
    """All-reduced sum; every rank holds the whole loss, so the gradient passes through."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None


def _shard(weight: Tensor, group: str) -> _Shard:
    if not group:
        return _Shard(0, weight.shape[0], None)
    process_group = dist.distributed_c10d._resolve_process_group(group)
    own = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(sizes, own, group=process_group)
    before = sizes[: dist.get_rank(process_group)]
    return _Shard(sum(int(s) for s in before), weight.shape[0], process_group)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias)
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def _statistics(z: Tensor, top: Tensor, target: Tensor, shard: _Shard):
    """log p(w) [n], log sum exp [n] of the shifted logits, and these [n, V]: z - top."""
    shifted = z - top[:, None]
    own, here = shard.find(target)
    own = own[:, None]
    z_target = shard.sum(shifted.gather(1, own)[:, 0] * here)
    e = shifted.exp()
    e = e.scatter(1, own, e.gather(1, own).masked_fill(here[:, None], 0.0))
    others = shard.sum(e.sum(1))  # sum_{y != w} exp(z_y - top)
    some = others > 0
    odds = torch.where(some, others, 1.0).log() - z_target  # log of (1 - p) / p
    log_prob = -torch.where(some, torch.logaddexp(torch.zeros_like(odds), odds), 0.0)
    return log_prob, (others + z_target.exp()).log(), shifted


def _block(hidden, weight, bias, *, target, bag, options: ce.Options, shard: _Shard):
    """Counted rows: hidden [n, D], weight [V, D] -> loss, log p(w), lse, likeliest id, all [n]."""
    z = _logits(hidden, weight, bias, options.softcap)
    top, predicted = shard.maximum(z)
    log_prob, log_sum, shifted = _statistics(z, top, target, shard)
    loss = -log_prob
    if bag is not None:
        row, label = bag  # [P] pairs of row and a label other than the row's own
        at, here = shard.find(label)
        rest = torch.bincount(row, minlength=len(target))  # |Y without w|
        total = shifted.new_zeros(len(target)).index_add(0, row, shifted[row, at] * here)
        mean = shard.sum(total) / rest.clamp(min=1) - log_sum  # mean of log p(y) over the rest
        b = torch.where(rest > 0, options.smoothing, 0.0)
        loss = (1 - b) * loss - b * mean
    return loss, log_prob, top + log_sum, predicted


def _pairs(ids: Tensor, offsets: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(row, label) for every label of each row's bag that is not the row's own."""
    bag = index.clamp(min=0)
    counts = torch.where(index >= 0, offsets[bag + 1] - offsets[bag], 0)  # [n]
    row = torch.repeat_interleave(torch.arange(len(index), device=ids.device), counts)
    within = torch.arange(len(row), device=ids.device) - (counts.cumsum(0) - counts)[row]
    label = ids[offsets[bag][row] + within]
    other = label != target[row]
    return row[other], label[other]


def _blocks(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, shard: _Shard
) -> Iterator[tuple[Tensor, Callable]]:
    """Yield (rows, function of (hidden, weight, bias)) over blocks of counted rows."""
    target, *bags = labels
    counted = (target != options.ignore_index).nonzero()[:, 0]
    step = max(1, BLOCK_ELEMENTS // max(1, inputs.weight.shape[0]))
    smooth = labels.ids is not None and options.smoothing > 0 and len(labels.offsets) > 1
    for rows in counted.split(step) if len(counted) else ():
        pairs = _pairs(*bags[:2], labels.index[rows], target[rows]) if smooth else None
        yield rows, partial(_block, target=target[rows], bag=pairs, options=options, shard=shard)


def forward(inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> ce.Rows:
    wide = accumulation_dtype(inputs.hidden.dtype)
    results = [inputs.hidden.new_zeros(len(labels.target), dtype=wide) for _ in range(3)]
    results.append(torch.full_like(labels.target, -1))
    shard = _shard(inputs.weight, options.group)
    parameters = [None if x is None else x.to(wide) for x in inputs[1:]]
    for rows, block in _blocks(inputs, labels, options, shard):
        parts = block(inputs.hidden[rows].to(wide), *parameters)
        for result, part in zip(results, parts, strict=True):
            result[rows] = part
    return ce.Rows(*results)


def backward(
    upstream: ce.Upstream, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, head: ce.Head
) -> ce.Gradients:
    """By autograd on the blocks; dweight is added to `weight_grad` instead if that is given."""
    (hidden, weight, bias), (train_weight, weight_grad) = inputs, head
    wide = accumulation_dtype(hidden.dtype)
    dhidden = hidden.new_zeros(hidden.shape, dtype=wide)
    sums = [weight_grad, None if bias is None else bias.new_zeros(bias.shape, dtype=wide)]
    if train_weight and weight_grad is None:
        sums[0] = weight.new_zeros(weight.shape, dtype=wide)
    shard = _shard(weight, options.group)
    w, b = (None if x is None else x.to(wide) for x in (weight, bias))
    for rows, block in _blocks(inputs, labels, options, shard):
        above = [x[rows] for x in upstream]
        h = hidden[rows].to(wide)
        if sums[0] is None:
            frozen = partial(_with_weight, block, w)
            dhidden[rows], db = vjp(frozen, [h, b], above)
        else:
            dhidden[rows], dw, db = vjp(block, [h, w, b], above)
            sums[0] += dw
        if db is not None:
            sums[1] += db
    if shard.group is not None:
        dist.all_reduce(dhidden, group=shard.group)
    dweight = None if weight_grad is not None or sums[0] is None else sums[0].to(weight.dtype)
    dbias = None if bias is None else sums[1].to(bias.dtype)
    return ce.Gradients(dhidden.to(hidden.dtype), dweight, dbias)


def _with_weight(block: Callable, weight: Tensor, hidden: Tensor, bias: Tensor | None):
    return block(hidden, weight, bias)
