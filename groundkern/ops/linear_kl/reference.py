"""The specification of linear KL, in plain torch.

(T1)   z_n = softcap(U h_n + bias) / temperature,   log s_n = z_n - log sum_y exp(z_ny)
       and t_n of the teacher's head in the same way
(T2)   forward:  L_n = sum_y t log(t / s)
       reverse:  L_n = sum_y s log(s / t)
(T3)   js:       L_n = beta sum_y t log(t / m) + (1 - beta) sum_y s log(s / m)
                 m = beta t + (1 - beta) s

Forward and reverse are summed as t log(t / s) - t + s and s log(s / t) - s + t: what is added is 0
in sum and makes every term >= 0, and an error of a log-sum-exp no longer reaches the loss in first
order. Each head's likeliest entry is kept apart: its log-probability is -log(1 + the others), and
its gradient minus the sum of theirs, so nothing cancels as s or t -> 1.

With a process group the vocabulary is sharded over its ranks in rank order; every rank holds all
rows and gets the same results.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.head_gradients import by_autograd
from groundkern.head_products import gathered, group_sum
from groundkern.ops import linear_kl as kl
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import BLOCK_ELEMENTS


@dataclass(frozen=True)
class _Shard:
    """This process's part of the vocabulary, and the sums over all parts."""

    group: dist.ProcessGroup | None

    def sum(self, x: Tensor) -> Tensor:
        """Over all parts, for results that every rank holds."""
        return group_sum(x, self.group)

    def shared(self, x: Tensor) -> Tensor:
        """Over all parts, for what each part's entries are computed from."""
        return group_sum(x, self.group, shared=True)

    def likeliest(self, z: Tensor) -> Tensor:
        """bool [n, V]: the first largest logit of each row over the whole vocabulary."""
        value, index = z.detach().max(1)
        own = torch.arange(z.shape[1], device=z.device) == index[:, None]
        if self.group is None:
            return own
        here = gathered(value, self.group).max(0).indices == dist.get_rank(self.group)
        return own & here[:, None]


def _log_probs(hidden, weight, bias, softcap: float, temperature: float, shard: _Shard) -> Tensor:
    """(T1) [n, V]."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = (softcap * torch.tanh(z / softcap) if softcap > 0 else z) / temperature
    own = shard.likeliest(z)
    top = shard.shared(torch.where(own, z, 0.0).sum(1))
    beside = torch.where(own, 0.0, z - top[:, None])  # z_y - z_own
    others = shard.shared(torch.where(own, 0.0, beside.exp()).sum(1))
    return beside - others.log1p()[:, None]


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p x, 0 where p is: x may be infinite there. NaN is passed on."""
    none = p == 0
    return torch.where(none, 0.0, p * torch.where(none, 0.0, x))


def _block(hidden, weight, bias, *, teacher: Tensor, options: kl.Options, shard: _Shard):
    """Counted rows: hidden [n, D], weight [V, D], the teacher's log-probabilities -> loss [n]."""
    log_s = _log_probs(hidden, weight, bias, options.softcap, options.temperature, shard)
    s, t = log_s.exp(), teacher.exp()
    neither = (s == 0) & (t == 0)
    log_ratio = torch.where(neither, 0.0, teacher - log_s)  # log(t / s)
    if options.kind == "forward":
        terms = _times(t, log_ratio) - t + s
    elif options.kind == "reverse":
        terms = _times(s, -log_ratio) - s + t
    else:
        # log(m / t) or log(m / s), of whichever is larger; only one of low and high is not 0
        low, high = (torch.where(x, 0.0, log_ratio) for x in (log_ratio > 0, log_ratio <= 0))
        rest = (options.beta * torch.expm1(low)).log1p()
        rest = rest + ((1 - options.beta) * torch.expm1(-high)).log1p()
        of_teacher, of_student = _times(t, low - rest), _times(s, -high - rest)
        terms = options.beta * of_teacher + (1 - options.beta) * of_student
    return shard.sum(terms.sum(1))


def _blocks(
    inputs: kl.Inputs, rows: kl.Rows, options: kl.Options, shard: _Shard
) -> Iterator[tuple[Tensor, Callable]]:
    """Yield (rows, function of (hidden, weight, bias)) over blocks of counted rows."""
    hidden, wide = inputs.hidden, accumulation_dtype(inputs.hidden.dtype)
    counted = torch.arange(hidden.shape[0], device=hidden.device)
    counted = counted if rows.counted is None else counted[rows.counted]
    _, *head = (None if x is None else x.to(wide) for x in inputs[3:])
    step = max(1, BLOCK_ELEMENTS // max(1, inputs.weight.shape[0]))
    for some in counted.split(step) if len(counted) else ():
        given = (inputs.teacher_hidden[some].to(wide), *head)
        teacher = _log_probs(*given, options.teacher_softcap, options.temperature, shard)
        yield some, partial(_block, teacher=teacher, options=options, shard=shard)


def _shard(group: str) -> _Shard:
    return _Shard(dist.distributed_c10d._resolve_process_group(group) if group else None)


def forward(inputs: kl.Inputs, rows: kl.Rows, options: kl.Options) -> Tensor:
    """Loss [N]."""
    hidden, wide = inputs.hidden, accumulation_dtype(inputs.hidden.dtype)
    loss = hidden.new_zeros(hidden.shape[0], dtype=wide)
    head = [None if x is None else x.to(wide) for x in inputs[1:3]]
    for some, block in _blocks(inputs, rows, options, _shard(options.group)):
        loss[some] = block(hidden[some].to(wide), *head)
    return loss


def backward(
    upstream: kl.Upstream,
    inputs: kl.Inputs,
    rows: kl.Rows,
    options: kl.Options,
    train_weight: bool,
) -> kl.Gradients:
    """By autograd on the blocks."""
    shard = _shard(options.group)
    blocks = _blocks(inputs, rows, options, shard)
    return by_autograd(blocks, upstream, *inputs[:3], train_weight=train_weight, group=shard.group)
