"""The specification of linear cross entropy, in plain torch.

       z_n  = softcap(U h_n + bias) / temperature,   lse_n = log sum_y exp(z_ny)
       log p_n(y) = z_ny - lse_n,    H_n = -sum_y p_n(y) log p_n(y)
       L_n  = sum_y t_ny (-log p_n(y)) + z_loss lse_n^2

with weights t of the row's own label w, of the labels of its list and of the whole vocabulary
(e = label_smoothing, c = class_weight, or 1):

       t_nw += (1 - e) own_n a_n;     t_ny += (1 - e) b_n weights_y for y != w in its list;
       t_ny += e / V c_y for every y

(D3)   a list of labels that share b = smoothing, the bag of an image:  a_n = 1 - b and b_n = b / r,
       r its number of labels other than w, copies counted; a_n = 1 if r = 0
       soft targets (smoothing = 0):  a_n = b_n = 1

log p(w) is formed as -log(1 + sum_{y != w} exp(z_y - z_w)): its gradient at the target is minus the
sum of the other probabilities, so p - 1 does not cancel as p -> 1.

With a process group the vocabulary is sharded over its ranks in rank order; every rank holds all
rows and gets the same results.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.head_gradients import by_autograd
from groundkern.head_products import Shard, gathered, group_sum
from groundkern.ops import linear_cross_entropy as ce
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import BLOCK_ELEMENTS


@dataclass(frozen=True)
class _Shard:
    """This process's part of the vocabulary, and the sums over all parts."""

    first: int  # id of this shard's first row of the weight
    rows: int
    vocabulary: int  # entries of all shards
    group: dist.ProcessGroup | None

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local index (clamped) of each id, and whether it is here."""
        local = ids - self.first
        return local.clamp(0, max(self.rows - 1, 0)), (local >= 0) & (local < self.rows)

    def sum(self, x: Tensor) -> Tensor:
        return group_sum(x, self.group)

    def top(self, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest logits [n, count] and their ids over the whole vocabulary, without gradient;
        of equal ones the smallest ids. Beyond the vocabulary -inf and -1."""
        if count == 1:
            values, index = z.detach().max(1, keepdim=True)
        else:
            values, index = z.detach().sort(dim=1, descending=True, stable=True)
        values, index = values[:, :count], index[:, :count] + self.first
        missing = (0, count - values.shape[1])
        values = torch.nn.functional.pad(values, missing, value=-torch.inf)
        index = torch.nn.functional.pad(index, missing, value=-1)
        if self.group is None:
            return values, index
        parts = gathered(values, self.group), gathered(index, self.group)
        values, index = (
            x.transpose(0, 1).flatten(1) for x in parts
        )  # in the order of ranks, hence of ids
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values[:, :count], index.gather(1, order[:, :count])


def _shard(weight: Tensor, group: str) -> _Shard:
    shard = Shard.of(weight, group)
    return _Shard(shard.first, shard.rows, shard.vocabulary, shard.group)


def _logits(inputs: ce.Inputs, options: ce.Options) -> Tensor:
    z = torch.nn.functional.linear(*inputs)
    z = options.softcap * torch.tanh(z / options.softcap) if options.softcap > 0 else z
    return z / options.temperature


def _statistics(z: Tensor, top: Tensor, target: Tensor, shard: _Shard):
    """log p(w) [n], log sum exp of the shifted logits [n], these [n, V]: z - top, and their
    exponentials."""
    shifted = z - top[:, None]
    own, here = shard.find(target)
    own = own[:, None]
    z_target = shard.sum(shifted.gather(1, own)[:, 0] * here)
    e = shifted.exp()
    without = e.scatter(1, own, e.gather(1, own).masked_fill(here[:, None], 0.0))
    others = shard.sum(without.sum(1))  # sum_{y != w} exp(z_y - top)
    some = others > 0
    odds = torch.where(some, others, 1.0).log() - z_target  # log of (1 - p) / p
    log_prob = -torch.where(some, torch.logaddexp(torch.zeros_like(odds), odds), 0.0)
    return log_prob, (others + z_target.exp()).log(), shifted, e


class _List(NamedTuple):
    """The labels of rows' lists other than the rows' own, one pair of row and label after the
    other, and how many a row has."""

    row: Tensor  # int64 [P]
    label: Tensor  # int64 [P]
    weight: Tensor  # [P]
    rest: Tensor  # int64 [n]


@dataclass(frozen=True)
class _Block:
    """A block of counted rows, as a function of hidden [n, D], weight [V, D] and bias [V]."""

    target: Tensor  # [n]
    own: Tensor  # [n]
    list: _List | None
    class_weight: Tensor | None  # [V] of this shard
    options: ce.Options
    shard: _Shard

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The fields of `ce.Rows`, without those that are not wanted."""
        options, shard = self.options, self.shard
        z = _logits(ce.Inputs(*inputs), options)
        values, ids = shard.top(z, max(1, options.top_k))
        top = values[:, 0]
        log_prob, log_sum, shifted, e = _statistics(z, top, self.target, shard)
        lse = top + log_sum
        results = [self._loss(log_prob, log_sum, shifted) + options.z_loss * lse**2, log_prob, lse]
        if options.entropy:
            mean = shard.sum((e * shifted).sum(1)) / log_sum.exp()
            results.append(log_sum - mean)
        results.append(ids[:, 0])
        if options.top_k > 0:
            results += [ids, values - lse[:, None]]
        return tuple(results)

    def _loss(self, log_prob: Tensor, log_sum: Tensor, shifted: Tensor) -> Tensor:
        options, shard, own, listed = self.options, self.shard, self.own, self.list
        of_vocabulary = of_list = 0.0
        if options.label_smoothing > 0:
            c = torch.ones_like(shifted[0]) if self.class_weight is None else self.class_weight
            total = shard.sum(c.sum()) * log_sum - shard.sum((c * shifted).sum(1))
            of_vocabulary = options.label_smoothing / shard.vocabulary * total
        if listed is not None:
            b = listed.weight
            if options.smoothing > 0:
                b = b * options.smoothing / listed.rest[listed.row]
                own = torch.where(listed.rest > 0, (1 - options.smoothing) * own, own)
            at, here = shard.find(listed.label)
            zero = torch.zeros_like(log_sum)
            of_labels = zero.index_add(0, listed.row, b * shifted[listed.row, at] * here)
            of_list = zero.index_add(0, listed.row, b) * log_sum - shard.sum(of_labels)
        return (1 - options.label_smoothing) * (of_list - own * log_prob) + of_vocabulary


def _list(labels: ce.Labels, rows: Tensor, wide: torch.dtype) -> _List | None:
    """The lists of some rows, if there are any."""
    target, _, ids, weights, offsets, index, _ = labels
    if ids is None or len(offsets) < 2:
        return None
    target, index = target[rows], index[rows]
    at = index.clamp(min=0)
    counts = torch.where(index >= 0, offsets[at + 1] - offsets[at], 0)  # [n]
    row = torch.repeat_interleave(torch.arange(len(index), device=ids.device), counts)
    within = torch.arange(len(row), device=ids.device) - (counts.cumsum(0) - counts)[row]
    place = offsets[at][row] + within
    other = ids[place] != target[row]
    row, place = row[other], place[other]
    weight = torch.ones(len(row), dtype=wide, device=ids.device)
    if weights is not None:
        weight = weights[place].to(wide)
    return _List(row, ids[place], weight, torch.bincount(row, minlength=len(target)))


def _blocks(
    inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, shard: _Shard
) -> Iterator[tuple[Tensor, _Block]]:
    """Yield (rows, block) over blocks of counted rows."""
    wide = accumulation_dtype(inputs.hidden.dtype)
    counted = (labels.target != options.ignore_index).nonzero()[:, 0]
    step = max(1, BLOCK_ELEMENTS // max(1, inputs.weight.shape[0]))
    own = torch.ones_like(labels.target, dtype=wide) if labels.own is None else labels.own.to(wide)
    c = labels.class_weight
    c = None if c is None else c[shard.first : shard.first + shard.rows].to(wide)
    for rows in counted.split(step) if len(counted) else ():
        listed = _list(labels, rows, wide)
        yield rows, _Block(labels.target[rows], own[rows], listed, c, options, shard)


def forward(inputs: ce.Inputs, labels: ce.Labels, options: ce.Options) -> ce.Rows:
    wide = accumulation_dtype(inputs.hidden.dtype)
    zeros = partial(inputs.hidden.new_zeros, dtype=wide)
    count, ids = len(labels.target), torch.full_like(labels.target, -1)
    results = ce.Rows(
        *(zeros(count) for _ in range(3)),
        zeros(count) if options.entropy else None,
        ids,
        ids[:, None].repeat(1, options.top_k) if options.top_k > 0 else None,
        zeros(count, options.top_k) if options.top_k > 0 else None,
    )
    shard = _shard(inputs.weight, options.group)
    parameters = [None if x is None else x.to(wide) for x in inputs[1:]]
    wanted = [x for x in results if x is not None]
    for rows, block in _blocks(inputs, labels, options, shard):
        parts = block(inputs.hidden[rows].to(wide), *parameters)
        for result, part in zip(wanted, parts, strict=True):
            result[rows] = part
    return results


def backward(
    upstream: ce.Upstream, inputs: ce.Inputs, labels: ce.Labels, options: ce.Options, head: ce.Head
) -> ce.Gradients:
    """By autograd on the blocks; dweight is added to `weight_grad` instead if that is given."""
    shard = _shard(inputs.weight, options.group)
    blocks = _blocks(inputs, labels, options, shard)
    above = [x for x in upstream if x is not None]
    return by_autograd(blocks, above, *inputs, **head._asdict(), group=shard.group)
