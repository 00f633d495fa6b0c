"""What it costs that keys lie on two ranks: the time of `groundkern.parallel` over that of the same
op of one process with the keys of one rank.

python -m benchmarks.split_keys [--keys 8192] [--rows 64] [--rounds 20]

Both run on both of two gloo processes, one after the other in every round, and the ratio is taken
within it. A call is a forward and a backward, on the native kernels in fp32, one thread each.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from groundkern import QueryRows, attention_kl, parallel, side_attention

RANKS, HEADS, KV_HEADS, DIM = 2, 28, 4, 128  # heads of Qwen2.5-VL-7B


def _calls(keys: int, count: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """(one process with this rank's keys, all ranks) by name; each returns a loss."""
    draw = torch.Generator().manual_seed(0)
    rank, half = dist.get_rank(), keys // RANKS
    position = torch.arange(count) + keys - count  # an answer, at the end
    rows = QueryRows.causal(torch.zeros_like(position), position)
    shard = parallel.Shard(parallel.Sharding.zigzag(keys, RANKS))
    split = parallel.ShardedRows(rows, shard)
    columns = torch.arange(keys // 8, keys // 2, dtype=torch.int32)[None]
    local = shard.columns(columns).columns
    target = torch.rand(count, local.shape[1], generator=draw)
    all_q = torch.randn(count, HEADS, DIM, generator=draw, requires_grad=True)
    q = all_q.detach()[split.own].requires_grad_()
    draw.manual_seed(rank + 1)
    k, v = (
        torch.randn(1, KV_HEADS, half, DIM, generator=draw, requires_grad=True) for _ in range(2)
    )
    maps = {"over": "visible"}
    return {
        "side_attention": (
            lambda: side_attention(all_q, k, v, split.keys).out.sum(),
            lambda: parallel.side_attention(q, k, v, split).out.sum(),
        ),
        "attention_kl": (
            lambda: attention_kl(all_q, k, target, split.keys, local, **maps).sum(),
            lambda: parallel.attention_kl(q, k, target, split, local, **maps).sum(),
        ),
    }


def _timed(call: Callable[[], Tensor]) -> tuple[float, float]:
    """(seconds, CPU seconds) of forward and backward."""
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    call().backward()
    return time.perf_counter() - began, time.process_time() - cpu


def _run(rank: int, port: int, keys: int, rows: int, rounds: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, (alone, together) in _calls(keys, rows).items():
        for call in (alone, together):
            call().backward()
        pairs = [(_timed(alone), _timed(together)) for _ in range(rounds)]
        if rank == 0:
            one, all_ranks = ([pair[i][0] for pair in pairs] for i in (0, 1))
            ratio = median(b[0] / a[0] for a, b in pairs)
            cpu = median(b[1] / a[1] for a, b in pairs)
            print(
                f"{name}: one process {median(one) * 1e3:.1f} ms, {RANKS} ranks "
                f"{median(all_ranks) * 1e3:.1f} ms; ratio {ratio:.2f}, of CPU time {cpu:.2f}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Prints a line for each function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=8192, help="of both ranks")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    words = (port, given.keys, given.rows, given.rounds)
    start_processes(_run, words, nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main()
