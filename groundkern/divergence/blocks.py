"""The divergence of attention maps from targets, some rows at a time, forward and backward.

A block's map is made, its divergence taken, and neither is kept: the backward makes the map again,
forms its gradient in closed form and hands it to the backward of the map's op. What is alive of a
block, about ten arrays [n, C], is held to a budget of bytes, as logits are: `set_logit_budget`, or
2**26 on CPU and 2**28 elsewhere, where fewer and larger calls are faster. At 4096 columns of fp32
these are 409 and 1638 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern import checks
from groundkern.divergence.terms import Terms, gradient, value
from groundkern.kept import kept, versions
from groundkern.once import once
from groundkern.ops.attention_map.api import attention_kl, attention_map
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import logit_chunks
from groundkern.selection import KeySets, QueryRows, Selection

CPU_BYTES, BYTES = 2**26, 2**28
ARRAYS = 10  # [n, C] in the accumulation dtype that are alive at a time


class Inputs(NamedTuple):
    """A model's tensors, as `attention_map` takes them."""

    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    head_weight: Tensor | None
    lse: Tensor | None


class Target(NamedTuple):
    """What the maps are compared with: a tensor, or another model's map."""

    tensor: Tensor | None  # [N, C] >= 0
    model: Inputs | None
    # [N], what it is divided by, of whole rows whose columns lie on several ranks; 0: no target.
    # None: its sum over the row's own columns.
    total: Tensor | None = None
    # [N], the sum over all ranks of what is at least the floor; None: that of the own columns
    floored: Tensor | None = None


class How(NamedTuple):
    """Everything else."""

    rows: QueryRows
    columns: Tensor  # int32 [B, C]
    allowed: KeySets | None
    over: str  # "visible" | "columns" | "renormalised"
    terms: Terms
    floor: float  # the least share of the target in an own column, of "reverse_kl"
    options: dict[str, Any]  # of the ops: scale, softcap, backend
    target_options: dict[str, Any]  # the same of the other model

    def versions(self) -> tuple[int, ...] | None:
        """How often rows, columns and sets were written to."""
        sets = () if self.allowed is None else self.allowed.tensors()
        return versions((*self.rows.tensors(), self.columns, *sets))


class _Block(NamedTuple):
    """Some rows, and the sequences that hold their keys."""

    at: slice  # of N
    sequences: slice  # of B
    rows: QueryRows
    columns: Tensor
    allowed: KeySets | None

    def part(self, x: Inputs) -> Inputs:
        """The block's part of the inputs."""
        weight = x.head_weight
        weight = weight[self.at] if weight is not None and weight.dim() == 2 else weight
        lse = None if x.lse is None else x.lse[self.at]
        return Inputs(x.q[self.at], x.k[self.sequences], weight, lse)

    def places(self, x: Inputs) -> tuple[slice, ...]:
        """Where the parts are in the inputs."""
        whole = x.head_weight is not None and x.head_weight.dim() == 1
        return self.at, self.sequences, slice(None) if whole else self.at, self.at


def _blocks(how: How, dtype: torch.dtype) -> tuple[_Block, ...]:
    """All rows in blocks, made once a step."""
    rows, columns, allowed = how.rows, how.columns, how.allowed
    device = columns.device
    budget = CPU_BYTES if device.type == "cpu" else BYTES
    each = ARRAYS * accumulation_dtype(dtype).itemsize
    chunks = logit_chunks(len(rows), columns.shape[1], each, budget)
    whole = _Block(slice(0, len(rows)), slice(None), rows, columns, allowed)
    if len(chunks) < 2:
        return (whole,) if chunks else ()
    key = "blocks", chunks[0].stop, len(chunks)
    return kept(rows, (columns, allowed), key, lambda: tuple(_block(whole, x) for x in chunks))


def _block(whole: _Block, at: slice) -> _Block:
    rows, columns, allowed = whole.rows, whole.columns, whole.allowed
    sequences, sequence = slice(None), rows.sequence[at]
    if checks.values_visible(sequence):  # else it would be a wait for the device
        first, last = int(sequence[0]), int(sequence[-1])
        sequences, sequence = slice(first, last + 1), sequence - first
    others = (x[at] for x in (rows.position, rows.start, rows.stop))
    if allowed is not None:
        allowed = KeySets(allowed.bits, allowed.index[at], allowed.keys)
    of_rows = QueryRows(sequence, *others, rows.most)
    return _Block(at, sequences, of_rows, columns[sequences], allowed)


class _Made(NamedTuple):
    """A block's target, and which rows have one."""

    p: Tensor  # [n, C], 0 off the own columns
    share: Tensor  # [n], its sums: 1, or 0 without a target; on several ranks what is on this one
    has: Tensor  # bool [n]
    lost: Tensor  # bool [n]: a model's map that is too small for its dtype


def _least(x: Tensor) -> float:
    """Numbers from here on have all their digits in x's dtype, and so have parts of them."""
    finfo = torch.finfo(x.dtype)
    return finfo.tiny / finfo.eps


def _map(inputs: Inputs, block: _Block, over: str, options: dict) -> Tensor:
    """[n, C] in the accumulation dtype."""
    q, k, weight, lse = inputs
    over = "columns" if over == "columns" else "visible"
    given = {"over": over, "allowed": block.allowed, "lse": lse, "head_weight": weight, **options}
    return attention_map(q, k, block.rows, block.columns, **given)


def _target(target: Target, block: _Block, how: How, dtype: torch.dtype) -> _Made:
    """P of (K5)."""
    own = Selection.of(block.rows, block.allowed, block.columns).own_columns()  # [n, C]
    lost = own.new_zeros(len(own))
    if target.model is None:
        p = target.tensor[block.at].to(dtype).masked_fill(~own, 0.0)
    else:
        model = block.part(target.model)
        p = _map(model, block, how.over, how.target_options).to(dtype)
        if how.over != "columns" and target.total is None:
            lost = own.any(1) & (p.sum(1) < _least(p))
    total = p.sum(1) if target.total is None else target.total[block.at]
    has = total > 0
    p = p / torch.where(has, total, 1.0)[:, None]
    if how.terms.kind == "reverse_kl":
        p = p.clamp_(min=how.floor).masked_fill_(~own, 0.0)
        floored = p.sum(1) if target.floored is None else target.floored[block.at]
        p = p / torch.where(floored > 0, floored, 1.0)[:, None]
    share = has.to(dtype) if target.total is None else p.sum(1)
    return _Made(p, share, has, lost)


def _in_log_space(how: How) -> bool:
    """Whether the op itself takes the divergence."""
    return how.terms.kind == "kl" and how.over != "renormalised"


def _made(inputs: Inputs, target: _Made, block: _Block, how: How) -> Tensor:
    """What the op makes: the map [n, C], or KL [n] of the share of P that is here, which the op
    renormalises."""
    if not _in_log_space(how):
        return _map(inputs, block, how.over, how.options)
    q, k, weight, lse = inputs
    given = {"over": how.over, "allowed": block.allowed, "lse": lse, "head_weight": weight}
    return attention_kl(q, k, target.p, block.rows, block.columns, **given, **how.options)


def _value(made: Tensor, target: _Made, how: How) -> tuple[Tensor, Tensor]:
    """The rows' divergence [n], and bool [n], which of them is lost to underflow."""
    if _in_log_space(how):
        log_share = torch.where(target.share > 0, target.share, 1.0).log()
        rows = target.share * (made + log_share)  # (P3)
        return rows.masked_fill(~target.has, 0.0), target.lost
    q, lost, total = made, target.lost, None
    if how.over == "renormalised":
        mass = made.sum(1)
        q, total = made / torch.where(mass > 0, mass, 1.0)[:, None], (mass > 0).to(made.dtype)
        lost = lost | (target.has & (mass < _least(made)))
        if how.terms.kind == "kl":
            lost = lost | ((target.p > 0) & (made < _least(made))).any(1)
    return value(q, target.p, how.terms, total).masked_fill(~target.has, 0.0), lost


def _gradient(made: Tensor, target: _Made, upstream: Tensor, how: How) -> Tensor:
    """The gradient of `made`, of upstream gradients [n]."""
    if _in_log_space(how):
        return (target.share * upstream).masked_fill(~target.has, 0.0)
    if how.over != "renormalised":
        d = gradient(made, target.p, how.terms)
    else:
        mass = made.sum(1, keepdim=True)
        scale = torch.where(mass > 0, mass, 1.0)
        q = made / scale
        d = gradient(q, target.p, how.terms)
        d = d.sub_((d * q).sum(1, keepdim=True)).div_(scale)
    return d.mul_(upstream[:, None]).masked_fill_(~target.has[:, None], 0.0)


class _Divergence(Function):
    """[N], and bool [N]: the rows that are lost to underflow."""

    @staticmethod
    def forward(ctx, how: How, q, k, head_weight, lse, *reference: Tensor | None):
        inputs = Inputs(q, k, head_weight, lse)
        ctx.how, ctx.versions = how, how.versions()
        ctx.save_for_backward(*inputs, *reference)
        target, wide = _grouped(reference), accumulation_dtype(q.dtype)
        rows = torch.zeros(len(q), dtype=wide, device=q.device)
        lost = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        for block in _blocks(how, q.dtype):
            p = _target(target, block, how, wide)
            made = _made(block.part(inputs), p, block, how)
            rows[block.at], lost[block.at] = _value(made, p, how)
            del p, made
        ctx.mark_non_differentiable(lost)
        return rows, lost

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        how, (q, k, weight, lse, *reference) = ctx.how, ctx.saved_tensors
        inputs, wanted = Inputs(q, k, weight, lse), ctx.needs_input_grad[1:5]
        if ctx.versions != how.versions():
            expected = "rows, key sets and columns that nothing is written to before the backward"
            checks.fail("rows", expected, "ones changed by an inplace operation", RuntimeError)
        found = _gradients(inputs, wanted, _grouped(reference), upstream.detach(), how)
        found = once("attention_divergence", found, inputs)
        return None, *found, *[None] * len(reference)


def _gradients(
    inputs: Inputs, wanted: tuple[bool, ...], target: Target, upstream: Tensor, how: How
) -> list[Tensor | None]:
    """Those of the inputs that are wanted, block by block."""
    blocks, wide = _blocks(how, inputs.q.dtype), accumulation_dtype(inputs.q.dtype)
    sums: list[Tensor | None] = [
        _sum(x) if needed and len(blocks) != 1 else None
        for x, needed in zip(inputs, wanted, strict=True)
    ]
    for block in blocks:
        with torch.no_grad():
            p = _target(target, block, how, wide)
        found = _block_gradients(inputs, wanted, p, upstream[block.at], block, how)
        if len(blocks) == 1:
            sums = found
            break
        for total, place, part in zip(sums, block.places(inputs), found, strict=True):
            if total is not None and part is not None:
                total[place] += part
    return [None if d is None else d.to(x.dtype) for d, x in zip(sums, inputs)]


def _sum(x: Tensor) -> Tensor:
    """Zeros like x, in which parts are added up without losing digits."""
    return torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)


def _block_gradients(
    inputs: Inputs,
    wanted: tuple[bool, ...],
    target: _Made,
    upstream: Tensor,
    block: _Block,
    how: How,
) -> list[Tensor | None]:
    """Those of a block's parts of the inputs that are wanted."""
    with torch.enable_grad():
        leaves = Inputs(
            *(
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip(block.part(inputs), wanted, strict=True)
            )
        )
        made = _made(leaves, target, block, how)
    with torch.no_grad():
        d = _gradient(made.detach(), target, upstream, how)
    chosen = [x for x, needed in zip(leaves, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(made, chosen, d, allow_unused=True))
    return [next(found) if needed else None for needed in wanted]


def _grouped(reference: tuple[Tensor | None, ...] | list[Tensor | None]) -> Target:
    tensor, total, floored, *model = reference
    return Target(tensor, None if model[0] is None else Inputs(*model), total, floored)


def divergence(inputs: Inputs, target: Target, how: How) -> tuple[Tensor, Tensor]:
    """[N] in the accumulation dtype, differentiable in the inputs; and bool [N], the rows that are
    lost because a map is smaller than its dtype can say."""
    model = (None,) * len(Inputs._fields) if target.model is None else target.model
    reference = (target.tensor, target.total, target.floored, *model)
    detached = (None if x is None else x.detach() for x in reference)
    return _Divergence.apply(how, *inputs, *detached)
