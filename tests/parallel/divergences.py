"""`parallel.attention_divergence` against one process: every kind, of tensors and of models."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from groundkern import AttentionReference, attention_divergence, attention_map, parallel
from tests.parallel import drawing
from tests.parallel.comparing import Results, backward, errors, gradients, leaves, options, whole
from tests.parallel.drawing import Call

SEEDS = (5, 51)  # calls with rows, columns and head weights; of a tensor, and of a model
WAYS = [
    (kind, over)
    for kind, over in product(("kl", "reverse_kl", "js"), ("visible", "columns", "renormalised"))
    if (kind, over) != ("reverse_kl", "visible")
]


def divergences() -> None:
    """In fp64, and in fp32 where all maps underflow."""
    for of_model, seed in enumerate(SEEDS):
        call = drawing.call(seed, dist.get_world_size())
        call = replace(call, trained={"q", "k", "head_weight"})
        ways = [(*way, {"beta": 0.3}) for way in WAYS] + [
            ("reverse_kl", "renormalised", {"floor": 0.02}),
            ("reverse_kl", "columns", {"floor": 0.02}),
        ]
        for kind, over, how in ways:
            how = {"kind": kind, "over": over, **how}
            truth = _alone(call, how, torch.float64, bool(of_model))
            mine = _split(call, how, torch.float64, bool(of_model))
            found = errors(whole(mine, None), truth)
            over_limit = {name: error for name, error in found.items() if not error <= 1e-12}
            assert not over_limit, f"{seed} {how}: {over_limit}"
    _underflow()
    _refused()


def _model(call: Call, dtype: torch.dtype) -> AttentionReference:
    """Another model on the same tokens: other heads, other sizes."""
    draw = torch.Generator().manual_seed(7)
    count, (batch, _, length, _) = len(call.rows), call.k.shape
    q = torch.randn(count, 3, 8, generator=draw, dtype=torch.float64)
    k = torch.randn(batch, 1, length, 8, generator=draw, dtype=torch.float64)
    weight = torch.rand(3, generator=draw, dtype=torch.float64)
    return AttentionReference(q.to(dtype), k.to(dtype), weight, scale=0.9)


def _alone(call: Call, how: dict, dtype: torch.dtype, of_model: bool) -> Results:
    call = leaves(call, dtype)
    reference = _model(call, dtype) if of_model else call.target
    given = {**options(call, "reference"), "allowed": call.allowed, **how}
    given |= {"rows": call.rows, "columns": call.columns, "head_weight": call.head_weight}
    results = {"kl": attention_divergence(call.q, call.k, reference, **given)}
    backward(results, call.above)
    return {**results, **gradients(call)}


def _split(call: Call, how: dict, dtype: torch.dtype, of_model: bool) -> Results:
    """This rank's part in its place of the whole, zero elsewhere."""
    shard = parallel.Shard(call.sharding)
    rows = parallel.ShardedRows(call.rows, shard, call.owner)
    local, mine = shard.columns(call.columns), rows.own
    part = {"q": call.q[mine], "k": shard.take(call.k, 2)}
    here = leaves(replace(call, **part, target=local.take(call.target, call.rows)), dtype)
    reference = here.target
    if of_model:
        model = _model(call, dtype)
        reference = model._replace(q=model.q[mine], k=shard.take(model.k, 2))
    given = {**options(call, "reference"), **how, "head_weight": here.head_weight}
    given["allowed"] = None if call.allowed is None else shard.sets(call.allowed)
    own = parallel.attention_divergence(here.q, here.k, reference, rows, local.columns, **given)
    backward({"kl": own}, {"kl": call.above["kl"][mine]})
    found = gradients(here)
    placed = {
        "kl": own.detach().new_zeros(len(rows)).index_copy(0, mine, own.detach()),
        "dq": torch.zeros(call.q.shape, dtype=dtype).index_copy(0, mine, found["dq"]),
        "dk": torch.zeros(call.k.shape, dtype=dtype).index_copy(2, shard.positions, found["dk"]),
    }
    return {**found, **placed}


def _underflow() -> None:
    """Renormalised maps whose mass is below the least number of fp32."""
    call = drawing.call(30, dist.get_world_size())
    k = call.k.clone()
    k[:, :, 0] = 50.0  # a key that takes all attention, and is no column
    call = replace(call, q=call.q.abs(), k=k, columns=call.columns[:, 4:], trained={"q", "k"})
    call = replace(call, target=call.target[:, 4:])
    mass = attention_map(call.q, call.k, call.rows, call.columns, over="visible").sum(1)
    assert bool((mass[mass > 0] < torch.finfo(torch.float32).tiny).any())
    for kind in ("kl", "reverse_kl", "js"):
        how = {"kind": kind, "over": "renormalised"}
        truth = _alone(call, how, torch.float64, False)["kl"]
        found = whole({"kl": _split(call, how, torch.float32, False)["kl"]}, None)["kl"]
        torch.testing.assert_close(found, truth.detach(), rtol=1e-3, atol=1e-3)


def _refused() -> None:
    call = drawing.call(SEEDS[0], dist.get_world_size())
    for how in ({"kind": "hellinger"}, {"beta": 1.0}, {"kind": "reverse_kl", "over": "visible"}):
        with pytest.raises(ValueError, match=r"`(kind|beta|over)`: expected"):
            _split(call, how, torch.float64, False)
    call, rank = leaves(call, torch.float64), dist.get_rank()
    shard = parallel.Shard(call.sharding)
    rows, local = parallel.ShardedRows(call.rows, shard, call.owner), shard.columns(call.columns)
    model = _model(call, torch.float64)
    weight = model.head_weight if rank == 0 else None  # the others would wait for messages
    reference = AttentionReference(model.q[rows.own], shard.take(model.k, 2), weight)
    q, k = call.q[rows.own], shard.take(call.k, 2)
    with pytest.raises(ValueError, match="`call`: expected"):
        parallel.attention_divergence(q, k, reference, rows, local.columns)
