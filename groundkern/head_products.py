"""What the Triton launchers of the ops on a head share without knowing Triton: matrix products with
fp32 results, and a vocabulary that is sharded over a process group."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b, summed and written in fp32 whatever the operands' dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()  # an upcast only under the interpreter
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape], in rank order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


class Shard(NamedTuple):
    """This rank's rows of a head's weight among those of a group."""

    group: dist.ProcessGroup | None
    first: Tensor | int  # id of the first row
    widest: int  # rows of the weight on the rank that has most

    @classmethod
    def of(cls, weight: Tensor, group: str) -> "Shard":
        """group: its name, "": none."""
        if not group:
            return cls(None, 0, weight.shape[0])
        process_group = dist.distributed_c10d._resolve_process_group(group)
        rows = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
        shards = gathered(rows, process_group)
        first = shards[: dist.get_rank(process_group)].sum()
        # A sync: all ranks must cut the rows alike.
        return cls(process_group, first, int(shards.max()))
