"""Calls of the ops' Triton launchers on meta tensors: forward and backward, nothing computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from unittest import mock

import torch
from torch import Tensor

from benchmarks.aot.recorder import recorded  # first: it takes triton without its interpreter
from groundkern import row_blocks
from groundkern.calls import Call
from groundkern.ops import attention_map as maps
from groundkern.ops import linear_cross_entropy as loss
from groundkern.ops import linear_kl as kl
from groundkern.ops import side_attention as side
from groundkern.ops.attention_map import triton_launch as attention_map_launch
from groundkern.ops.linear_cross_entropy import triton_launch as linear_cross_entropy_launch
from groundkern.ops.linear_kl import triton_launch as linear_kl_launch
from groundkern.ops.side_attention import triton_launch as side_attention_launch
from groundkern.selection import KeySets, QueryRows, Selection
from groundkern.taken import Places
from groundkern.taken_kernels import join

__all__ = [
    "TILE_TABLES",
    "Sizes",
    "attention_map",
    "linear_cross_entropy",
    "linear_kl",
    "recorded",
    "rows_taken",
    "side_attention",
]

# (table, parts of a key without a bucket of rows)
TILE_TABLES = (
    (side_attention_launch.TILES, 3),
    (side_attention_launch.SMALL_TILES, 3),
    (attention_map_launch.TILES, 2),
    (attention_map_launch.SMALL_TILES, 2),
)


@dataclass(frozen=True)
class Sizes:
    """What a call's tensors are like.

    layout: of q, k, v and g "transposed" ([B, S, H, D] seen as [B, H, S, D]) or with "odd strides";
    of every tensor "unaligned": one element into its storage.
    """

    rows: int = 64
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    value_dim: int | None = None  # dim
    keys: int = 4096
    columns: int = 1024
    batch: int = 2
    hidden: int = 2048
    vocabulary: int = 151_936
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        off = self.layout == "unaligned"
        return torch.empty(prod(shape) + off, dtype=dtype, device="meta")[off:].view(shape)

    def operand(self, *shape: int) -> Tensor:
        """[N, H, D] or [B, H, S, D]."""
        if self.layout == "transposed":
            *lead, a, b, dim = shape
            return self.empty(*lead, b, a, dim, dtype=self.dtype).transpose(-3, -2)
        odd = self.layout == "odd strides"
        x = self.empty(*shape[:-1], shape[-1] + odd, dtype=self.dtype)
        return x[..., : shape[-1]]

    def attention(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and g, which is like an output."""
        value_dim = self.value_dim or self.dim
        keys = (self.batch, self.kv_heads, self.keys)
        return (
            self.operand(self.rows, self.heads, self.dim),
            self.operand(*keys, self.dim),
            self.operand(*keys, value_dim),
            self.operand(self.rows, self.heads, value_dim),
        )

    def rows_and_sets(self, sets: bool) -> tuple[QueryRows, KeySets | None]:
        """All rows, and 8 sets or none."""
        *of_rows, index = (self.empty(self.rows, dtype=torch.int32) for _ in range(5))
        bits = self.empty(8, -(-self.keys // 32), dtype=torch.int32)
        return QueryRows(*of_rows), KeySets(bits, index, self.keys) if sets else None

    def selection(self, sets: bool) -> Selection:
        return Selection.of(*self.rows_and_sets(sets))


def side_attention(sizes: Sizes, sets: bool, lse: bool, softcap: float) -> None:
    """Forward and, without a given lse, backward."""
    q, k, v, like_out = sizes.attention()
    out = sizes.empty(*like_out.shape, dtype=sizes.dtype)
    statistics = sizes.empty(sizes.rows, sizes.heads)
    inputs = side.Inputs(q, k, v, statistics if lse else None)
    rest = sizes.empty(*like_out.shape, dtype=sizes.dtype)
    outputs = side.Outputs(out, statistics, rest if rest.itemsize == 2 else rest.new_empty(0))
    options = side.Options(sizes.dim**-0.5, softcap)
    rows, allowed = sizes.rows_and_sets(sets)
    plan = side_attention_launch.plan(inputs, rows, allowed)
    call = Call(Selection.of(rows, allowed), plan, options, "triton")
    side_attention_launch.forward(inputs, call)
    if not lse:
        upstream = side.Upstream(out, statistics)
        side_attention_launch.backward(upstream, inputs, outputs, call)


KINDS = {
    ("kl", "mean"): maps.KL_MEAN,
    ("kl", "each"): maps.KL_EACH,
    ("map", "weight"): maps.MAP,
    ("map", "value"): maps.CONTRIBUTION,
}


def attention_map(
    sizes: Sizes,
    function: str,
    kind: str,
    over: str,
    softcap: float,
    rectify: bool = True,
    adds: bool = False,
) -> None:
    """Forward and backward of a KL, of the map or of contributions (kind "value"); `adds`: to what
    other ops have found for the keys."""
    q, k, v, g = sizes.attention()
    columns = sizes.empty(sizes.batch, sizes.columns, dtype=torch.int32)
    dmap, weight = sizes.empty(sizes.rows, sizes.columns), sizes.empty(sizes.rows, sizes.heads)
    valued, target = kind == "value", dmap if function == "kl" else None
    given = (v, g, None) if valued else (None, None, weight)
    inputs = maps.Inputs(q, k, *given, target, None)
    rows, allowed = sizes.rows_and_sets(False)
    flags = (KINDS[function, kind], over, valued and rectify)
    options = maps.Options(*flags, sizes.dim**-0.5, softcap)
    plan = attention_map_launch.plan(inputs, rows, allowed, columns, options)
    call = Call(Selection.of(rows, allowed, columns), plan, options, "triton")
    outputs = attention_map_launch.forward(inputs, call)
    above = maps.Upstream(dmap[:, 0].contiguous() if function == "kl" else dmap)
    dk = sizes.empty(*k.shape, dtype=k.dtype) if adds else None
    attention_map_launch.backward(above, inputs, maps.Saved(*outputs[1:]), call, dk)


@dataclass(frozen=True)
class _Queries:
    """Rows of a layer."""

    sequence: Tensor
    position: Tensor

    def queries(self) -> tuple[Tensor, Tensor]:
        return self.sequence, self.position


def rows_taken(sizes: Sizes, side_tokens: bool) -> None:
    """The join of the main pass's gradients with those of two selections of rows and, if there are
    side tokens, of ops beside it."""
    rows, length = sizes.empty(sizes.rows, dtype=torch.int32), sizes.keys
    places = Places([_Queries(rows, rows)] * 2, length + (sizes.rows if side_tokens else 0))
    of_rows, dk, dv, _ = sizes.attention()
    dq = sizes.operand(sizes.batch, sizes.heads, length, sizes.dim)
    main, beside = ((dq, dk, dv), (dk, dv)) if side_tokens else ((dq, None, None), (None, None))
    join(places, main, beside, [of_rows] * 2, dq.shape)


@contextmanager
def _one_of_a_group(op, vocabulary: int) -> Iterator[None]:
    """A launcher's calls run as on one rank of a process group, which nobody else is in."""
    shard = op.Shard(object(), 0, vocabulary, vocabulary, vocabulary)
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (op.Shard, "of", lambda *_: shard),
            (op, "gathered", lambda x, _: x[None]),
            (torch.distributed, "all_reduce", lambda *_, **__: None),
            (torch.distributed, "get_world_size", lambda *_: 2),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def linear_cross_entropy(
    sizes: Sizes,
    bias: bool,
    lists: str,
    softcap: float,
    *,
    head: str = "trained",
    everything: bool = False,
    sharded: bool = False,
    budget: int | None = None,
    logits: torch.dtype | None = None,
) -> None:
    """Forward, backward, and the forward that makes the gradients.

    lists: "bags", "soft" targets of 8 labels a row, or "".
    head: "trained", "frozen", or "added": its gradient is added to one that is there.
    everything: label smoothing, class weights, entropy and top-k too. sharded: as on one rank of a
    group.
    budget, logits: for `set_logit_budget` and `set_logit_dtype`.
    """
    n, v = sizes.rows, sizes.vocabulary
    hidden, weight = (sizes.empty(m, sizes.hidden, dtype=sizes.dtype) for m in (n, v))
    target, index = (sizes.empty(n, dtype=torch.int64) for _ in range(2))
    soft = lists == "soft"
    listed, many = (8 * n, n) if soft else (100, sizes.batch)
    ids, offsets = (sizes.empty(m, dtype=torch.int64) for m in (listed, many + 1))
    upstream = loss.Upstream(*(sizes.empty(n) for _ in range(3)), None)
    if everything:
        upstream = upstream._replace(dentropy=sizes.empty(n))
    inputs = loss.Inputs(hidden, weight, sizes.empty(v, dtype=sizes.dtype) if bias else None)
    weighted = soft or everything
    own = sizes.empty(n) if weighted else None
    given = ids, sizes.empty(listed) if weighted else None, offsets, index
    labels = loss.Labels(
        target, own, *(given if lists else (None,) * 4), sizes.empty(v) if everything else None
    )
    smoothing = 0.3 if lists == "bags" else 0.0
    shared = (softcap, 1.0, -100, "", everything, 5 * everything)
    options = loss.Options(smoothing, 0.1 * everything, 0.0, *shared)
    arguments, trained = (inputs, labels, options), head != "frozen"
    grad = sizes.empty(v, sizes.hidden) if head == "added" else None
    before, op = row_blocks.logit_budget(), linear_cross_entropy_launch
    row_blocks.set_logit_budget(budget)
    row_blocks.set_logit_dtype(logits)
    with ExitStack() as stack:
        stack.callback(row_blocks.set_logit_budget, before)
        stack.callback(row_blocks.set_logit_dtype, None)
        if sharded:
            stack.enter_context(_one_of_a_group(op, v))
        op.forward(*arguments)
        op.backward(upstream, *arguments, loss.Head(trained, grad))
        op.forward_with_gradients(*arguments, loss.Ahead(upstream.dloss, trained))
        if not trained:  # of a frozen head, row by row
            op.forward_with_gradients(*arguments, loss.Ahead(None, trained))
        op.scaled(sizes.empty(v, sizes.hidden, dtype=sizes.dtype), sizes.empty(1)[0])


def linear_kl(
    sizes: Sizes,
    kind: str,
    bias: bool,
    mask: bool,
    softcap: float,
    *,
    sharded: bool = False,
    budget: int | None = None,
) -> None:
    """Forward, backward, and the forward that makes the gradients; of a teacher with hidden states
    of twice the size.

    sharded: as on one rank of a group. budget: bytes, for `set_logit_budget`.
    """
    n, v = sizes.rows, sizes.vocabulary
    heads = []
    for dim in (sizes.hidden, 2 * sizes.hidden):
        heads += [sizes.empty(m, dim, dtype=sizes.dtype) for m in (n, v)]
        heads.append(sizes.empty(v, dtype=sizes.dtype) if bias else None)
    rows = kl.Rows(sizes.empty(n, dtype=torch.bool) if mask else None)
    options = kl.Options(kind, 0.5, 2.0, softcap, softcap, "")
    arguments, dloss = (kl.Inputs(*heads), rows, options), sizes.empty(n)
    before, op = row_blocks.logit_budget(), linear_kl_launch
    row_blocks.set_logit_budget(budget)
    with ExitStack() as stack:
        stack.callback(row_blocks.set_logit_budget, before)
        if sharded:
            stack.enter_context(_one_of_a_group(op, v))
        op.forward(*arguments)
        op.backward(kl.Upstream(dloss), *arguments, True)
        _, gradients = op.forward_with_gradients(*arguments, kl.Ahead(dloss, False))
        op.scaled(gradients.dhidden, dloss[0])
        op.scaled(gradients.dhidden, dloss)
