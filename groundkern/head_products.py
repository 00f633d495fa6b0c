"""What the launchers of the ops on a head share: matrix products summed in fp32, and a vocabulary
that is sharded over a process group."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b, summed in fp32 and rounded once to out's dtype: the operands', or fp32."""
    wide = {"out_dtype": out.dtype} if out.dtype != a.dtype else {}
    if wide and not a.is_cuda:  # under the interpreter: torch has it on CUDA alone
        a, b, wide = a.float(), b.float(), {}
    if add:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape], in rank order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


class Shard(NamedTuple):
    """This rank's rows of a head's weight among those of a group."""

    group: dist.ProcessGroup | None
    first: int  # id of the first row
    rows: int
    widest: int  # rows of the weight on the rank that has most
    vocabulary: int  # rows of all

    @classmethod
    def of(cls, weight: Tensor, group: str) -> "Shard":
        """group: its name, "": none."""
        rows = weight.shape[0]
        if not group:
            return cls(None, 0, rows, rows, rows)
        process_group = dist.distributed_c10d._resolve_process_group(group)
        own = torch.full((1,), rows, dtype=torch.int64, device=weight.device)
        # A sync: all ranks must cut the rows alike.
        sizes = gathered(own, process_group)[:, 0].tolist()
        before = sizes[: dist.get_rank(process_group)]
        return cls(process_group, sum(before), rows, max(sizes), sum(sizes))


class _GroupSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, shared: bool) -> Tensor:
        ctx.group, ctx.shared = group, shared
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.shared:
            upstream = upstream.clone()
            dist.all_reduce(upstream, group=ctx.group)
        return upstream, None, None


def group_sum(x: Tensor, group: dist.ProcessGroup | None, *, shared: bool = False) -> Tensor:
    """The sum over a group's ranks, each of which holds the whole loss.

    Args:
        group: None: x itself.
        shared: whether each part's entries are computed from the sum, so that its gradient is
            summed too; that of a part of the loss passes through.
    """
    return x if group is None else _GroupSum.apply(x, group, shared)
