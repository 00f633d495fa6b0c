"""A call on several ranks, its keys or its heads split, against the same call of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import (
    attention_contribution,
    attention_kl,
    attention_map,
    parallel,
    side_attention,
)
from groundkern.parallel import heads
from tests.parallel.drawing import Call

Results = dict[str, Tensor]


def leaves(call: Call, dtype: torch.dtype) -> Call:
    """The call with its inputs as leaves of a dtype, in their own strides."""
    inputs = {}
    for field in fields(call):
        x = getattr(call, field.name)
        if isinstance(x, Tensor) and x.is_floating_point():
            trained = field.name in call.trained
            inputs[field.name] = x.detach().to(dtype).clone().requires_grad_(trained)
    return replace(call, **inputs)


def gradients(call: Call) -> Results:
    names = sorted(name for name in call.trained if getattr(call, name) is not None)
    found = {name: getattr(call, name) for name in names}
    return {
        f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()
    }


def backward(results: Results, above: Results) -> None:
    """Of the sum of all results, each with its upstream gradient; -inf counts as 0."""
    loss = sum(
        (torch.where(x.isinf(), 0.0, x) * above[name].to(x.dtype)).sum()
        for name, x in results.items()
    )
    if loss.requires_grad:
        loss.backward()


def options(call: Call, backend: str) -> dict:
    return {"scale": call.scale, "softcap": call.softcap, "backend": backend}


def one_process(call: Call, dtype: torch.dtype, backend: str) -> tuple[Results, Results]:
    """(results, gradients)."""
    call = leaves(call, dtype)
    given = {**options(call, backend), "allowed": call.allowed}
    mapped = {**given, "over": call.over}
    q, k, rows, columns = call.q, call.k, call.rows, call.columns
    out, lse = side_attention(q, k, call.v, rows, **given)
    weight = call.head_weight
    results = {
        "out": out,
        "lse": lse,
        "map": attention_map(q, k, rows, columns, head_weight=weight, **mapped),
        "contribution": attention_contribution(
            q, k, call.v, call.g, rows, columns, rectify=call.rectify, **mapped
        ),
        "kl": attention_kl(
            q, k, call.target, rows, columns, heads=call.heads, head_weight=weight, **mapped
        ),
    }
    backward(results, call.above)
    results["empty"] = lse.isinf().to(dtype)
    return results, gradients(call)


def split_keys(
    call: Call, group: dist.ProcessGroup, dtype: torch.dtype, backend: str
) -> tuple[Results, Results]:
    """This rank's results and gradients in their places of the whole ones, zero elsewhere: their
    sums over the ranks are those of one process."""
    shard = parallel.Shard(call.sharding, group)
    rows = parallel.ShardedRows(call.rows, shard, call.owner)
    local = shard.columns(call.columns)
    mine = rows.own
    here = leaves(
        replace(
            call,
            q=call.q[mine],
            g=call.g[mine],
            k=shard.take(call.k, 2),
            v=shard.take(call.v, 2),
            target=local.take(call.target, call.rows),
        ),
        dtype,
    )
    allowed = None if call.allowed is None else shard.sets(call.allowed)
    given = {**options(call, backend), "allowed": allowed}
    mapped = {**given, "over": call.over}
    q, k, v, weight = here.q, here.k, here.v, here.head_weight
    out, lse = parallel.side_attention(q, k, v, rows, **given)
    results = {
        "out": out,
        "lse": lse,
        "map": parallel.attention_map(q, k, rows, local.columns, head_weight=weight, **mapped),
        "contribution": parallel.attention_contribution(
            q, k, v, here.g, rows, local.columns, rectify=call.rectify, **mapped
        ),
        "kl": parallel.attention_kl(
            *(q, k, here.target, rows, local.columns),
            heads=call.heads,
            head_weight=weight,
            **mapped,
        ),
    }
    columns = {"map", "contribution"}
    above = {
        name: local.take(x, call.rows) if name in columns else x[mine]
        for name, x in call.above.items()
    }
    backward(results, above)
    results["empty"] = lse.isinf().to(dtype)
    width = call.columns.shape[1]
    place = local.place[call.rows.sequence.long()]
    place = torch.where(place >= 0, place, width)  # [N, C_r]

    def placed(name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if name in columns:
            whole = x.new_zeros(len(x), width + 1).scatter(1, place, x)
            return whole[:, :width]
        if name in ("dk", "dv"):
            whole = x.new_zeros(*x.shape[:2], shard.length, x.shape[3])
            return whole.index_copy(2, shard.positions, x)
        if name == "dhead_weight":
            return x
        return x.new_zeros(len(rows), *x.shape[1:]).index_copy(0, mine, x)

    return _placed(results, placed), _placed(gradients(here), placed)


def split_heads(
    call: Call, group: dist.ProcessGroup, dtype: torch.dtype, backend: str
) -> tuple[Results, Results]:
    """The same with all keys on every rank, and a share of the heads."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    first = sum(call.head_counts[:rank])
    kv = slice(first, first + call.head_counts[rank])
    each = call.q.shape[1] // call.k.shape[1]
    own = slice(kv.start * each, kv.stop * each)
    weight = None if call.head_weight is None else call.head_weight[..., own]
    mine = replace(call, q=call.q[:, own], g=call.g[:, own], k=call.k[:, kv], v=call.v[:, kv])
    here = leaves(replace(mine, head_weight=weight), dtype)
    rows = heads.HeadRows(call.rows, own.stop - own.start, group)
    given = {**options(call, backend), "allowed": call.allowed, "over": call.over}
    q, k, weight, columns = here.q, here.k, here.head_weight, call.columns
    sets = {name: x for name, x in given.items() if name != "over"}
    out, lse = side_attention(q, k, here.v, call.rows, **sets)
    results = {
        "out": out,
        "lse": lse,
        "map": heads.attention_map(q, k, rows, columns, head_weight=weight, **given),
        "contribution": heads.attention_contribution(
            q, k, here.v, here.g, rows, columns, rectify=call.rectify, **given
        ),
        "kl": heads.attention_kl(
            q, k, here.target, rows, columns, heads=call.heads, head_weight=weight, **given
        ),
    }
    counted = torch.arange(len(call.rows)) % ranks == rank  # every row by one rank
    apart = {"out", "lse"}
    above = {
        name: x[:, own] if name in apart else x * counted.view(-1, *[1] * (x.dim() - 1))
        for name, x in call.above.items()
    }
    backward(results, above)

    def placed(name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if name in results and name not in apart:
            return x / ranks
        like = call.above[name] if name in apart else getattr(call, name[1:])
        dim, at = (1, kv if name in ("dk", "dv") else own)
        dim = like.dim() - 1 if name == "dhead_weight" else dim
        whole = x.new_zeros(like.shape)
        whole.narrow(dim, at.start, at.stop - at.start).copy_(x)
        return whole

    return _placed(results, placed), _placed(gradients(here), placed)


def _placed(found: Results, place: Callable[[str, Tensor], Tensor]) -> Results:
    return {name: place(name, x) for name, x in found.items()}


def whole(found: Results, group: dist.ProcessGroup) -> Results:
    """Sums over the ranks; an lse of -inf counts as 0."""
    total = {}
    for name, x in found.items():
        x = torch.where(x == -torch.inf, 0.0, x.double()).contiguous()
        dist.all_reduce(x, group=group)
        total[name] = x
    return total


def errors(found: Results, truth: Results) -> dict[str, float]:
    """Of each tensor, relative to its largest element, or to 1 if that is smaller."""
    far = {}
    for name, x in found.items():
        wanted = truth[name].detach().double()
        wanted = torch.where(wanted.isinf(), 0.0, wanted)
        if x.numel() == 0:
            far[name] = 0.0
            continue
        error = (x - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        far[name] = float(error.nan_to_num(nan=torch.inf))
    return far
