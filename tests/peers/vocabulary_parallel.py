"""cut-cross-entropy 25.6.4, tests/test_vocab_parallel.py: 20 cases.

A classifier sharded over the ranks of a process group gives each the gradients that one rank has
with the whole. The ranks are started once for all cases.
"""

import functools
import json
import socket
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from groundkern import backends
from groundkern.compat import cut_cross_entropy as cce
from tests.peers.case import FLOATS, Case, Values, grid, served_by

SUITE = "cut-cross-entropy, sharded"
N, V, D = 252, 507, 123


def small(values: Values) -> Values:
    return {**values, "nprocs": 2}


def check_sharded(v: Values) -> None:
    failure = _on_ranks(v["nprocs"], backends._PREFERRED["cpu"])[repr(v)]
    assert failure is None, failure


@functools.cache
def _on_ranks(count: int, backend: str) -> dict[str, str | None]:
    """The first failure of each case, by its values."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        failures = Path(folder, "failures.json")
        mp.spawn(_rank, (count, port, backend, failures), nprocs=count)
        return json.loads(failures.read_text())


def _rank(rank: int, count: int, port: int, backend: str, path: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    failures = {}
    for case in SHARDED:
        values = {**case.values, "nprocs": count}
        with served_by(backend):
            error = _one(values)
        errors = [None] * count
        dist.all_gather_object(errors, error)
        failures[repr(values)] = next((x for x in errors if x), None)
    if rank == 0:
        path.write_text(json.dumps(failures))
    dist.destroy_process_group()


def _one(v: Values) -> str | None:
    torch.manual_seed(0)
    try:
        _compare(v)
    except Exception:
        return traceback.format_exc()
    return None


def _compare(v: Values) -> None:
    dtype = FLOATS[v["dtype"]]
    e = (torch.randn(N, D, dtype=dtype) / D**0.5).view(4, -1, D).requires_grad_()
    c, targets = torch.randn(V, D, dtype=dtype).requires_grad_(), torch.randint(0, V, (N,))
    if v["invalids"]:
        targets[torch.randperm(N)[: int(0.2 * N)]] = -100
    targets = targets.view(4, -1)
    options = cce.VocabParallelOptions.from_vocab(V)
    rows = slice(options.start, options.stop)
    shard = c.detach()[rows].clone().requires_grad_()
    sides = {}
    for name, weight, sharding in (("one", c, None), ("many", shard, options)):
        result = cce.linear_cross_entropy(
            e,
            weight,
            targets,
            impl=v["impl"],
            vocab_parallel_options=sharding,
            return_lse=v["z_loss"],
        )
        loss = result
        if v["z_loss"]:
            loss, lse = result
            loss += cce.compute_z_loss(lse, targets)
        sides[name] = loss.detach(), *torch.autograd.grad(loss, (e, weight))
    loss, de, dc = sides["one"]
    for a, b in zip(sides["many"], (loss, de, dc[rows])):
        assert torch.allclose(a, b, atol=v["tolerance"]), float((a - b).abs().max())


def check_parts(v: Values) -> None:
    """Parts of n rows follow one another, and no two differ by more than a row."""
    start, parts = 0, []
    for rank in range(v["world_size"]):
        with (
            mock.patch.object(dist, "get_rank", return_value=rank),
            mock.patch.object(dist, "get_world_size", return_value=v["world_size"]),
        ):
            part = cce.VocabParallelOptions.from_vocab(v["n"])
        size = v["n"] // v["world_size"] + (rank < v["n"] % v["world_size"])
        assert (part.start, part.stop) == (start, start + size)
        start = part.stop
        parts.append(part)
    assert parts[-1].stop == v["n"]


SHARDED: list[Case] = grid(
    SUITE,
    "test_vocab_parallel",
    check_sharded,
    {
        "impl": ["torch_compile", "cce_exact"],
        "dtype tolerance": [("fp16", 1e-3), ("bf16", 1e-2)],
        "nprocs": [4],
        "invalids": [False, True],
        "z_loss": [True, False],
    },
    small,
)
CASES = [
    *SHARDED,
    *grid(
        SUITE,
        "test_partition_n_into_range",
        check_parts,
        {"n": [1023, 2048], "world_size": [7, 8]},
    ),
]
