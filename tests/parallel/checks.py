"""What has to hold on four gloo processes, beyond random calls; each check runs on all of them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundkern import QueryRows, linear_cross_entropy, parallel, side_attention
from groundkern.parallel import Shard, ShardedRows, Sharding, heads
from groundkern.parallel.merging import merged_attention, merged_lse
from tests import closeness
from tests.parallel import drawing
from tests.parallel.comparing import (
    errors,
    leaves,
    one_process,
    split_heads,
    split_keys,
    whole,
)
from tests.parallel.divergences import divergences
from tests.parallel.drawing import Call
from tests.parallel.random_calls import worst_errors
from tests.sources import ROOT

RANKS = 4


def some(wanted: Callable[[Call], bool]) -> Call:
    """The first call for four ranks that is as wanted."""
    return next(c for c in (drawing.call(seed, RANKS) for seed in range(1000)) if wanted(c))


def group_of(ranks: int) -> dist.ProcessGroup | None:
    """The first ranks; None on the others."""
    group = dist.new_group(list(range(ranks)))
    return group if dist.get_rank() < ranks else None


def assert_exact(call: Call, group: dist.ProcessGroup, splits=(split_keys, split_heads)) -> None:
    results, gradients = one_process(call, torch.float64, "reference")
    truth = {**results, **gradients}
    for split in splits:
        results, gradients = split(call, group, torch.float64, "reference")
        found = errors(whole({**results, **gradients}, group), truth)
        over = {name: error for name, error in found.items() if not error <= 1e-12}
        assert not over, f"{split.__name__}: {over}"


def random_calls_in_fp64() -> None:
    for ranks in (2, 3, 4):
        group = group_of(ranks)
        if group is not None:
            found = worst_errors(range(5000, 5003), group, torch.float64)
            assert max(found.values())[0] <= 1e-12, found


def random_calls_in_fp32() -> None:
    found = worst_errors(range(6000, 6002), dist.group.WORLD, torch.float32, "auto")
    assert max(found.values())[0] <= 1e-5, found


def sixteen_bits() -> None:
    """No further from fp64 than one process in the same dtype, by the tests' one rule."""
    for seed, dtype in ((71, torch.bfloat16), (72, torch.float16)):
        call = drawing.call(seed, 4)
        inputs = {n: getattr(call, n).to(dtype).double() for n in ("q", "k", "v", "g")}
        call = replace(call, head_weight=None, trained={*inputs}, **inputs)
        truth, naive = (one_process(call, t, "reference") for t in (torch.float64, dtype))
        for split in (split_keys, split_heads):
            ours = [
                whole(x, dist.group.WORLD) for x in split(call, dist.group.WORLD, dtype, "auto")
            ]
            _hold(split.__name__, ours, naive, truth, dtype)


def _hold(name: str, ours, naive, truth, dtype: torch.dtype) -> None:
    factors = closeness.VALUES, closeness.GRADIENTS
    for mine, torchs, exact, factor in zip(ours, naive, truth, factors, strict=True):
        for key, x in mine.items():
            wanted = torch.where(exact[key].isinf(), 0.0, exact[key])
            plain = torch.where(torchs[key].isinf(), 0.0, torchs[key].double())
            if torchs[key].dtype == dtype:
                x = x.to(dtype)
            elif x.numel():  # fp32 results of 16-bit operands
                x = x.float()
            closeness.assert_close(f"{name} {key}", x, plain, wanted, factor)


def edges() -> None:
    """No rows, rows of padding alone, all keys on one rank, a rank with all rows, one key, no
    columns, no target, heads of weight 0."""
    world = dist.group.WORLD
    call = some(lambda c: len(c.rows) > 2 and c.k.shape[2] > 4)
    call = replace(call, trained={"q", "k", "v", "g", "head_weight"})
    count, length = len(call.rows), call.k.shape[2]
    none = call.rows.position * 0
    padding = QueryRows(call.rows.sequence, none - 1, none, none)
    one_rank = Sharding.contiguous([0, 0, length, 0])
    for changed in (
        {"rows": padding},
        {"rows": padding, "sharding": one_rank, "owner": None},
        {"sharding": one_rank, "owner": None},
        {"owner": torch.full((count,), 3)},
        {"target": call.target * 0},
        {"columns": call.columns * 0 - 1},
        {"head_weight": torch.zeros(call.q.shape[1], dtype=torch.float64), "heads": "each"},
    ):
        moved = {"sharding", "owner"} & {*changed}  # nothing to heads
        splits = (split_keys,) if moved else (split_keys, split_heads)
        assert_exact(replace(call, **changed), world, splits)
    assert_exact(some(lambda c: len(c.rows) == 0), world)
    assert_exact(some(lambda c: c.k.shape[2] == 1), world)


def a_map_that_underflows() -> None:
    """KL of maps of exp(-100) and less, in fp32: shares of heads are found in log space."""

    def steep(call: Call) -> Call:
        return replace(
            call, k=call.k * 500, softcap=None, heads="mean", head_weight=None, trained=set()
        )

    def underflows(call: Call) -> bool:  # -87.3 is the log of the least normal fp32
        kl = one_process(steep(call), torch.float64, "reference")[0]["kl"]
        return kl.numel() > 0 and float(kl.max()) > 88

    call = steep(some(underflows))
    plain, truth = (one_process(call, t, "reference") for t in (torch.float32, torch.float64))
    for split in (split_keys, split_heads):
        results, _ = split(call, dist.group.WORLD, torch.float32, "auto")
        kl = whole({"kl": results["kl"]}, dist.group.WORLD)["kl"]
        closeness.assert_close("kl", kl.float(), plain[0]["kl"], truth[0]["kl"], 3.0)


def _five_rows(group: dist.ProcessGroup | None = None, length: int = 20) -> ShardedRows:
    rows = QueryRows.causal(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 17, 0, 9, 19]))
    ranks = dist.get_world_size(group)
    return ShardedRows(rows, Shard(Sharding.zigzag(length, ranks), group))


def _inputs(rows: ShardedRows, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = ((2, 4, rows.shard.length, 16), *[(2, 2, rows.shard.length, 16)] * 2)
    whole_inputs = [torch.randn(shape, generator=draw) for shape in shapes]
    return tuple(rows.shard.take(x, 2).requires_grad_(grad) for x in whole_inputs)


def one_result_is_enough() -> None:
    """A rank may use another result of side attention than others do, or nothing but zeros."""
    rows, rank = _five_rows(), dist.get_rank()
    q, k, v = _inputs(rows)
    out, lse = parallel.side_attention(rows.take(q), k, v, rows)
    (out.sum() if rank == 0 else lse.sum() if rank == 1 else 0 * out.sum()).backward()
    assert bool(k.grad.isfinite().all()) and bool(k.grad.abs().sum() > 0)
    with torch.no_grad():
        again = parallel.side_attention(rows.take(q), k, v, rows)
    assert torch.equal(again.out, out) and not again.out.requires_grad


def one_derivative_is_all_there_is() -> None:
    """A gradient penalty of rows whose upstream gradient is constant is refused, not left out."""
    rows = _five_rows()
    out, lse = torch.rand(5, 4, 8, requires_grad=True), torch.rand(5, 4, requires_grad=True)
    merged = merged_attention(out, lse, rows.exchange)
    for result in (*merged, merged_lse(lse, rows.exchange)):
        (gradient,) = torch.autograd.grad(result.sum(), lse, create_graph=True)
        with pytest.raises(RuntimeError, match="expected one derivative"):
            gradient.square().sum().backward()


def recomputed() -> None:
    """Under checkpointing gradients are the same."""
    rows = _five_rows()
    columns = rows.shard.columns(torch.arange(0, 20, 3, dtype=torch.int32).expand(2, -1))
    target = columns.take(torch.ones(5, 7), rows.rows)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = rows.take(q)
        kl = parallel.attention_kl(own, k, target, rows, columns.columns, over="visible")
        return parallel.side_attention(own, k, v, rows).out.square().sum() + kl.sum()

    found = []
    for run in (loss, lambda *x: checkpoint(loss, *x, use_reentrant=False)):
        inputs = _inputs(rows)
        run(*inputs).backward()
        found.append([x.grad for x in inputs])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def the_example() -> None:
    """On two ranks as on one."""
    group = group_of(2)
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    if group is not None:
        step = runpy.run_path(str(ROOT / "examples" / "context_parallel.py"))["step"]
        torch.testing.assert_close(step(group), step(alone), rtol=1e-5, atol=1e-5)


def what_is_remembered() -> None:
    """A rank that remembers more of its own than others still sends what they wait for."""
    rows, rank = _five_rows(), dist.get_rank()
    q, k, v = _inputs(rows, grad=False)
    columns = rows.shard.columns(torch.arange(20, dtype=torch.int32).expand(2, -1))
    target, first = columns.take(torch.ones(5, 20), rows.rows), None
    all_q = q[0, :, :1].transpose(0, 1).repeat(5, 1, 1)
    for _ in range(2):
        kl = parallel.attention_kl(rows.take(q), k, target, rows, columns.columns, over="columns")
        first = kl if first is None else first
        for width in range(1, 16 if rank == 1 else 1):
            side_attention(all_q, k, v[..., :width], rows.keys)
    assert torch.equal(kl, first)


def a_cross_entropy_over_ranks() -> None:
    draw, rank = torch.Generator().manual_seed(5), dist.get_rank()
    hidden, weight = torch.randn(11, 8, generator=draw), torch.randn(30, 8, generator=draw)
    target = torch.randint(0, 30, (11,), generator=draw)
    target[3] = -100
    part = torch.arange(11).tensor_split(4)[rank]
    shard = Shard(Sharding.zigzag(8, 4))
    own = linear_cross_entropy(hidden[part], weight, target[part], reduction="sum").loss
    own = own / parallel.row_count(target[part], shard)
    dist.all_reduce(own)
    torch.testing.assert_close(own, linear_cross_entropy(hidden, weight, target).loss)


def what_is_refused() -> None:
    """On every rank, with a sentence, and without one that waits for the others."""
    rank, shard = dist.get_rank(), Shard(Sharding.zigzag(20, 4))
    sequence = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"`rows`: expected the same rows.*others on rank 2"):
        ShardedRows(QueryRows.causal(sequence, sequence + (rank == 2)), shard)
    rows = QueryRows.causal(sequence, sequence + 3)
    with pytest.raises(ValueError, match=r"`rows`: expected the same rows.*others on rank 1"):
        ShardedRows(rows, shard, torch.full((2,), int(rank == 1)))
    with pytest.raises(ValueError, match=r"`rows`: expected the same rows.*others on rank 3"):
        ShardedRows(rows, shard if rank < 3 else Shard(Sharding.striped(20, 4)))
    with pytest.raises(ValueError, match="`rows`: expected the same rows"):
        heads.HeadRows(QueryRows.causal(sequence, sequence + rank), 2)
    with pytest.raises(ValueError, match=r"`owner`: expected ranks in \[0, 4\)"):
        ShardedRows(rows, shard, torch.full((2,), 4))
    with pytest.raises(ValueError, match="`rows`: expected positions < 20"):
        ShardedRows(QueryRows.causal(sequence, sequence + 19), shard)
    with pytest.raises(ValueError, match="`group`: expected a group of 3 ranks"):
        Shard(Sharding.zigzag(20, 3))
    pair = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="`group`: expected a group of which"):
            Shard(Sharding.zigzag(20, 2), pair)
    moved = ShardedRows(rows, shard, torch.full((2,), 3))
    with pytest.raises(ValueError, match="`rows`: expected rows that their token's rank owns"):
        moved.take(torch.zeros(2, 2, len(shard), 16))


def calls_that_differ_are_refused() -> None:
    rows, rank = _five_rows(), dist.get_rank()
    q, k, v = _inputs(rows)
    with pytest.raises(ValueError, match="`call`: expected dtypes, heads"):
        parallel.side_attention(rows.take(q), k if rank else k.detach(), v, rows)
    with pytest.raises(ValueError, match="`call`: expected dtypes, heads"):
        parallel.side_attention(rows.take(q), k, v, rows, scale=0.5 if rank == 2 else None)
    out = parallel.side_attention(rows.take(q), k, v, rows).out
    (dk,) = torch.autograd.grad(out.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dk.sum().backward()


def compiled() -> None:
    """torch.compile leaves the functions as they are."""
    rows = _five_rows()
    q, k, v = _inputs(rows)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (parallel.side_attention(rows.take(q * 2), k, v, rows).out * 3).sum()

    expected = loss(q, k, v)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(q, k, v), expected)


def triton() -> None:
    """The Triton kernels, in the interpreter where there is no GPU."""
    found = worst_errors(range(9001, 9003), dist.group.WORLD, torch.float32, "triton")
    assert max(found.values())[0] <= 1e-5, found


def bytes_that_are_sent() -> None:
    """As many as `traffic` says, in every function, and none more for longer sequences."""
    drawn = some(lambda c: len(c.rows) > 4)
    for dtype in (torch.float32, torch.bfloat16):
        sent = [_sent(drawn, drawn.sharding, dtype)]
        longer = replace(
            drawn,
            k=torch.nn.functional.pad(drawn.k, (0, 0, 0, 5000)),
            v=torch.nn.functional.pad(drawn.v, (0, 0, 0, 5000)),
            allowed=None,
        )
        sharding = Sharding(torch.cat((drawn.sharding.owner, torch.arange(5000) % 4)), 4)
        sent.append(_sent(longer, sharding, dtype))
        assert sent[0] == sent[1]


def _sent(drawn: Call, sharding: Sharding, dtype: torch.dtype) -> dict[str, tuple]:
    """Counted bytes by function, which have to be those of `traffic`."""
    shard = Shard(sharding)
    rows = ShardedRows(drawn.rows, shard, drawn.owner)
    local = shard.columns(drawn.columns)
    own = rows.own
    here = replace(
        drawn,
        q=drawn.q[own],
        g=drawn.g[own],
        k=shard.take(drawn.k, 2),
        v=shard.take(drawn.v, 2),
        trained={"q", "k", "v", "g"},
    )
    here = leaves(here, dtype)
    target = local.take(drawn.target, drawn.rows).float()
    q, k, v, maps = here.q, here.k, here.v, {"over": "visible"}
    calls = {
        "side_attention": lambda: parallel.side_attention(q, k, v, rows).out,
        "attention_map": lambda: parallel.attention_map(q, k, rows, local.columns, **maps),
        "attention_contribution": lambda: parallel.attention_contribution(
            q, k, v, here.g, rows, local.columns, **maps
        ),
        "attention_kl": lambda: parallel.attention_kl(q, k, target, rows, local.columns, **maps),
    }
    counted = {}
    for name, call in calls.items():
        sizes = {"heads": q.shape[1], "dim": drawing.DIM, "value_dim": drawing.VALUE_DIM}
        expected = parallel.traffic(rows, name, dtype=dtype, **sizes)
        with Counted() as first:  # also what is compared, a number, and remembered once a step
            call()
        with Counted() as forward:
            result = call()
        with Counted() as back:
            result.float().sum().backward()
        once = first.sent - forward.sent - 8 * (RANKS - 1)
        found = parallel.Traffic(forward.sent, back.sent, once)
        assert found == expected, (name, found, expected)
        counted[name] = forward.sent, back.sent
    return counted


class Counted:
    """Counts the bytes that this rank hands to others, within the block."""

    names = ("all_to_all_single", "all_gather", "all_reduce")

    def __enter__(self) -> Counted:
        self.sent, self._patch = 0, pytest.MonkeyPatch()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        to_all, gather, reduce = (getattr(dist, name) for name in self.names)

        def all_to_all_single(output, message, got, sent, group=None):
            self.sent += (len(message) - sent[rank]) * message.shape[1] * message.itemsize
            return to_all(output, message, got, sent, group=group)

        def all_gather(outputs, x, group=None):
            self.sent += (ranks - 1) * x.nbytes
            return gather(outputs, x, group=group)

        def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
            self.sent += 2 * (ranks - 1) * x.nbytes // ranks
            return reduce(x, op, group=group)

        for name, function in zip(self.names, (all_to_all_single, all_gather, all_reduce)):
            self._patch.setattr(dist, name, function)
        return self

    def __exit__(self, *_) -> None:
        self._patch.undo()


CHECKS = {
    check.__name__: check
    for check in (
        random_calls_in_fp64,
        random_calls_in_fp32,
        sixteen_bits,
        edges,
        a_map_that_underflows,
        divergences,
        one_result_is_enough,
        one_derivative_is_all_there_is,
        recomputed,
        the_example,
        what_is_remembered,
        a_cross_entropy_over_ranks,
        what_is_refused,
        calls_that_differ_are_refused,
        bytes_that_are_sent,
    )
}
LONG = {check.__name__: check for check in (compiled, triton)}
