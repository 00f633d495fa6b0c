"""Main attention of a rank's part by the engines, beside the model's attention of the whole:

torchrun --nproc-per-node 3 -m tests.hf.engines OUT CALLS

Writes the largest error of each engine, over so many random calls of the one that takes any, and
what engines refuse, to OUT/RANK.json. DeepSpeed's is in tests/hf/ulysses.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.experimental._context_parallel import _attention as torchs
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.ranks.ring_on_cpu import ring_on_cpu
from groundkern.hf.model.engines.gather import GatherEngine
from groundkern.hf.model.engines.ring import RingEngine
from groundkern.hf.model.rows import Chunk, Window
from groundkern.parallel import Shard, Sharding


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Gemma 2's, whose softmax is always fp32, in the dtype of the call."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights = (logits + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


FUNCTIONS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}
FUNCTIONS["flash_attention_2"] = sdpa_attention_forward  # refused by its name
FP64 = torch.float64
ORDERS = {"zigzag": Sharding.zigzag, "contiguous": Sharding.even}


class Call(NamedTuple):
    """One call of the attention of the whole sequence."""

    tensors: tuple[Tensor, Tensor, Tensor]  # q, k, v
    upstream: Tensor  # [B, S, Hq, Dv], 0 for padding
    first_key: Tensor  # int32 [B, S]
    window: Window
    sharding: Sharding
    implementation: str
    kwargs: dict

    @property
    def function(self) -> Callable:
        """The model's attention function."""
        return FUNCTIONS[self.implementation]


class Attention(nn.Module):
    """What attention functions read of the module that calls them."""

    is_causal = True

    def __init__(self, call: Call) -> None:
        super().__init__()
        q, k, _ = call.tensors
        self.config = SimpleNamespace(_attn_implementation=call.implementation)
        self.num_key_value_groups, self.head_dim = q.shape[1] // k.shape[1], q.shape[-1]


def random_call(seed: int, dtype: torch.dtype, ranks: int) -> Call:
    """A call with any sharding, padding or documents, and window."""
    random = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    batch, length = pick(1, 3), pick(1, 2, 7, 16, 33)
    heads, group, dim, dim_v = pick(1, 2), pick(1, 3), pick(4, 8), pick(4, 6)
    q = normal(batch, heads * group, length, dim)
    k, v = normal(batch, heads, length, dim), normal(batch, heads, length, dim_v)
    upstream = normal(batch, length, heads * group, dim_v)
    first = torch.zeros(batch, length, dtype=torch.int32)
    match pick("plain", "left", "right", "documents"):
        case "left":
            padding = torch.randint(length, (batch, 1), generator=random)
            first += padding.int()
            upstream[(torch.arange(length) < padding)] = 0
        case "right":
            padding = torch.randint(length, (batch, 1), generator=random)
            upstream[(torch.arange(length) > padding)] = 0
        case "documents":
            new = torch.rand(batch, length, generator=random) < 0.2
            first = torch.where(new, torch.arange(length), 0).cummax(1).values.int()
    implementation = pick("sdpa", "eager")
    kwargs: dict = {"scaling": 0.3}
    if implementation == "eager":
        kwargs["softcap"] = pick(None, 2.0)
    window = pick(None, None, 3, Chunk(4))
    sharding = _sharding(pick, random, length, ranks)
    return Call((q, k, v), upstream, first, window, sharding, implementation, kwargs)


def _sharding(pick: Callable, random: torch.Generator, length: int, ranks: int) -> Sharding:
    match pick("contiguous", "zigzag", "striped", "any"):
        case "zigzag":
            return Sharding.zigzag(length, ranks)
        case "striped":
            return Sharding.striped(length, ranks, block=pick(1, 3))
        case "any":
            return Sharding(torch.randint(ranks, (length,), generator=random), ranks)
    cuts = torch.randint(length + 1, (ranks - 1,), generator=random).sort().values
    edges = torch.cat((torch.tensor([0]), cuts, torch.tensor([length])))
    return Sharding.contiguous(edges.diff().tolist())


def seen(call: Call) -> Tensor:
    """bool [B, S, S], token by token."""
    batch, length = call.first_key.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for token in range(length):
            first = int(call.first_key[row, token])
            start = first
            if isinstance(call.window, Chunk) and token >= first:
                start = first + (token - first) // call.window.size * call.window.size
            elif isinstance(call.window, int):
                start = max(first, token + 1 - call.window)
            mask[row, token, start : token + 1] = True
            mask[row, token, token] = True  # padding sees itself, lest it be NaN
    return mask


def whole(call: Call) -> list[Tensor]:
    """The output of the whole and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in call.tensors]
    mask = seen(call)[:, None]
    if call.implementation == "eager":
        dtype = leaves[0].dtype
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    out = call.function(Attention(call), *leaves, mask, **call.kwargs)[0]
    (out * call.upstream).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def part(call: Call, engine: Callable, shard: Shard) -> list[Tensor]:
    """The same of this rank's tokens, by an engine."""
    leaves = [shard.take(x, 2).clone().requires_grad_() for x in call.tensors]
    positions = {"position_ids": shard.positions[None]}
    args = shard, call.first_key, call.window, {**call.kwargs, **positions}
    out = engine(call.function, Attention(call), *leaves, *args)
    (out * shard.take(call.upstream, 1)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def error(call: Call, engine: Callable) -> float:
    """The largest difference between this rank's part of the whole and the engine's, over the
    largest value; padding's output counts for being finite only."""
    shard, worst = Shard(call.sharding), 0.0
    counted = (call.upstream != 0).to(call.upstream.dtype)
    for index, (ours, full) in enumerate(zip(part(call, engine, shard), whole(call), strict=True)):
        if index == 0:
            full, ours = full * counted, ours * shard.take(counted, 1)
        off = ours - shard.take(full, 1 if index == 0 else 2)
        if off.numel():
            worst = max(worst, float(off.abs().max() / full.abs().max().clamp(min=1e-3)))
        assert bool(ours.isfinite().all())
    return worst


def plain_call(dtype: torch.dtype, ranks: int, group: int, order: str, key_heads: int = 2) -> Call:
    """A call that torch's and DeepSpeed's engines take, with so many query heads for a key head."""
    random = torch.Generator().manual_seed(group)
    length, heads = 6 * ranks, key_heads * group
    q, k, v = (
        torch.randn(2, h, length, 8, generator=random, dtype=dtype)
        for h in (heads, key_heads, key_heads)
    )
    upstream = torch.randn(2, length, heads, 8, generator=random, dtype=dtype)
    sharding = ORDERS[order](length, ranks)
    first_key = torch.zeros(2, length, dtype=torch.int32)
    return Call((q, k, v), upstream, first_key, None, sharding, "sdpa", {"scaling": 0.3})


def refusals(engine: Callable, call: Call) -> dict[str, str]:
    """What an engine says to calls that differ from one it takes."""
    length = call.first_key.shape[1]
    ranks = call.sharding.ranks
    others = {
        "window": call._replace(window=3),
        "documents": call._replace(first_key=call.first_key + 1),
        "order": call._replace(sharding=Sharding.striped(length, ranks)),
        "implementation": call._replace(implementation="flash_attention_2"),
        "dropout": call._replace(kwargs={"dropout": 0.1}),
        "causal": call._replace(kwargs={"is_causal": False}),
    }
    shorter = [x[:, :, 1:] for x in call.tensors]
    others["length"] = call._replace(
        tensors=tuple(shorter),
        upstream=call.upstream[:, 1:],
        first_key=call.first_key[:, 1:],
        sharding=Sharding.zigzag(length - 1, ranks),
    )
    said = {}
    for name, other in others.items():
        try:
            part(other, engine, Shard(other.sharding))
        except ValueError as refusal:
            said[name] = str(refusal)
    return said


def ring_error(dtype: torch.dtype, ranks: int) -> float:
    """Of torch's ring, whose sums are made in the dtype of the call."""
    was, torchs._cp_options.convert_to_f32 = torchs._cp_options.convert_to_f32, False
    calls = (plain_call(dtype, ranks, group, "zigzag") for group in (1, 3))
    worst = max(error(call, RingEngine()) for call in calls)
    torchs._cp_options.convert_to_f32 = was
    return worst


def main(out: str, calls: str) -> None:
    """Writes {"gather float64": error, ...}, and what engines refuse."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, object] = {"cpu": refusals(RingEngine(), plain_call(FP64, ranks, 1, "zigzag"))}
    ring_on_cpu()
    engine = GatherEngine()
    for dtype in (torch.float64, torch.float32):
        errors = [error(random_call(seed, dtype, ranks), engine) for seed in range(int(calls))]
        found[f"gather {dtype}"] = max(errors)
        found[f"ring {dtype}"] = ring_error(dtype, ranks)
    for name, engine in (("gather", GatherEngine()), ("ring", RingEngine())):
        found[name] = refusals(engine, plain_call(FP64, ranks, 1, "zigzag"))
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
