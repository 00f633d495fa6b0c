"""Supervised attention in a training loop of one's own, whose sequences are split over ranks:

torchrun --nproc-per-node 2 examples/context_parallel.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import KeySets, QueryRows, parallel

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 50, 4, 2, 16


def step(group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The loss of a step, and the gradient of a weight that every rank has."""
    # Every rank has the same batch, but for the tensors that are as long as its sequences.
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, 32)
    weight = (torch.randn((HEADS + 2 * KV_HEADS) * DIM, 32) / 6).requires_grad_()
    rows = QueryRows.causal(torch.tensor([0, 0, 1]), torch.tensor([40, 41, 49]))
    sets = KeySets.from_bool(torch.rand(1, LENGTH) < 0.5, torch.zeros(3, dtype=torch.int32))
    columns = torch.arange(4, 36, dtype=torch.int32).expand(BATCH, -1)  # the image's tokens
    target = torch.rand(3, 32)

    # Its part of these, once a step:
    sharding = parallel.Sharding.zigzag(LENGTH, dist.get_world_size(group))
    shard = parallel.Shard(sharding, group)
    split = parallel.ShardedRows(rows, shard)
    allowed, local = shard.sets(sets), shard.columns(columns)
    wanted = local.take(target, rows)

    # In every layer, with the queries, keys and values of its tokens:
    heads = (shard.take(hidden, 1) @ weight.T).unflatten(2, (-1, DIM)).transpose(1, 2)
    q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
    q = split.take(q)
    out, _ = parallel.side_attention(q, k, v, split, allowed=allowed)
    kl = parallel.attention_kl(q, k, wanted, split, local.columns, over="visible")

    # Each rank adds up its own rows and divides by the number of all.
    loss = (out.square().sum() + kl.sum()) / len(split)
    loss.backward()
    for x in (loss.detach(), weight.grad):  # the sum: DDP averages, so times the ranks there
        dist.all_reduce(x, group=group)
    return loss.detach(), weight.grad


if __name__ == "__main__":
    dist.init_process_group("gloo")
    loss, gradient = step()
    if dist.get_rank() == 0:
        print(f"loss {float(loss):.6f}, gradient {float(gradient.norm()):.6f}")
    dist.destroy_process_group()
