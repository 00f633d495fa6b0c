"""The Triton kernels of linear cross entropy: what happens to one chunk of logits in memory.

Per row, with w its label:  top = max_y z_y,  others = sum_{y != w} exp(z_y - top),  own = z_w.
`others` is kept apart from w's own term, so neither log p nor its gradient cancels as p -> 1, and
only differences to `top` are exponentiated.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern.tile_kernels import capped, uncapped_gradient, wide
from groundkern.tiles import helper, kernel

IGNORED = tl.constexpr(-(2**62))  # `own` of an ignored row
# Rows of the statistics [5, n]; `rest` counts the bag's labels other than w.
TOP, OTHERS, OWN, MEAN, REST = (tl.constexpr(i) for i in range(5))


class Logits(NamedTuple):
    x: Tensor  # fp32 [n, V], before bias and softcap
    bias: Tensor | None  # [V]
    softcap: float | None
    V: int


class Bags(NamedTuple):
    labels: Tensor  # int64 [T]: columns of the logits, one bag after the other
    copies: Tensor | None  # fp32 [T]: how often a bag has the label, 0 at all copies but the first
    offsets: Tensor  # int64 [G + 1]


@helper
def _load_logits(z, row, columns, mask):
    """The capped logits of one row, -inf outside the mask, and the raw ones."""
    raw = tl.load(z.x + row * z.V + columns, mask=mask, other=0.0)
    if z.bias is not None:
        raw += tl.load(z.bias + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, capped(raw, z.softcap), float("-inf")), raw


@kernel
def _partial_kernel(
    z,  # `Logits`
    target_ptr,  # int64 [n]: column of the row's label, outside [0, V) on another rank
    parts_ptr,  # fp32 [3, n, blocks]: top, others, own
    ids_ptr,  # int64 [n, blocks]
    rows,  # n
    blocks,
    BLOCK: tl.constexpr,
):
    """The statistics of one row over one block of the vocabulary."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    own = tl.load(target_ptr + row)
    if own != IGNORED:
        columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        y, _ = _load_logits(z, row, columns, columns < z.V)
        top = tl.max(y, 0)
        e = tl.where(columns == own, 0.0, tl.exp(y - top))
        part_ptr = parts_ptr + program
        part = wide(rows) * blocks
        tl.store(part_ptr, top)
        tl.store(part_ptr + part, tl.sum(e, 0))
        tl.store(part_ptr + 2 * part, tl.max(tl.where(columns == own, y, float("-inf")), 0))
        first = tl.min(tl.where(y == top, columns, z.V - 1), 0)
        tl.store(ids_ptr + program, first.to(tl.int64))


@kernel
def _combine_kernel(
    parts_ptr,  # fp32 [3, n, parts]
    ids_ptr,  # int64 [n, parts]
    target_ptr,  # int64 [n]
    statistics_ptr,  # fp32 [5, n]
    predicted_ptr,  # int64 [n]
    rows,  # n
    parts,
    BLOCK: tl.constexpr,
):
    """One row's statistics from its parts', in order: blocks of the vocabulary, or ranks."""
    row = tl.program_id(0).to(tl.int64)
    stride = wide(rows)
    own = tl.load(target_ptr + row)
    if own == IGNORED:
        for i in tl.static_range(5):
            tl.store(statistics_ptr + i * stride + row, 0.0)
        tl.store(predicted_ptr + row, tl.full((), -1, tl.int64))
    else:
        part = tl.arange(0, BLOCK)
        mask = part < parts
        at_ptr = parts_ptr + row * parts + part
        tops = tl.load(at_ptr, mask=mask, other=float("-inf"))
        others = tl.load(at_ptr + stride * parts, mask=mask, other=0.0)
        owns = tl.load(at_ptr + 2 * stride * parts, mask=mask, other=float("-inf"))
        ids = tl.load(ids_ptr + row * parts + part, mask=mask, other=2**62)
        top = tl.max(tops, 0)
        tl.store(statistics_ptr + TOP * stride + row, top)
        tl.store(statistics_ptr + OTHERS * stride + row, tl.sum(others * tl.exp(tops - top), 0))
        tl.store(statistics_ptr + OWN * stride + row, tl.max(owns, 0))
        tl.store(statistics_ptr + MEAN * stride + row, 0.0)
        tl.store(statistics_ptr + REST * stride + row, 0.0)
        tl.store(predicted_ptr + row, tl.min(tl.where(tops == top, ids, 2**62), 0))


@kernel
def _bag_kernel(
    z,  # `Logits`
    bags,  # `Bags`
    target_ptr,  # int64 [n]
    index_ptr,  # int64 [n]: bag of each row, -1: none
    statistics_ptr,  # fp32 [5, n]: reads TOP, writes MEAN and REST
    rows,  # n
    BLOCK: tl.constexpr,
):
    """(D3) mean_{y in Y, y != w} z_y - top of one row, over the labels in this weight."""
    row = tl.program_id(0).to(tl.int64)
    stride = wide(rows)
    own = tl.load(target_ptr + row)
    bag = tl.load(index_ptr + row)
    if (own != IGNORED) & (bag >= 0):
        top = tl.load(statistics_ptr + TOP * stride + row)
        start = tl.load(bags.offsets + bag)
        stop = tl.load(bags.offsets + bag + 1)
        total = tl.zeros((BLOCK,), tl.float32)
        rest = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, stop, BLOCK):
            i = at + tl.arange(0, BLOCK)
            label = tl.load(bags.labels + i, mask=i < stop, other=own)
            here = (label != own) & (label >= 0) & (label < z.V)
            y, _ = _load_logits(z, row, label, here)
            total += tl.where(here, y - top, 0.0)
            rest += tl.where(label != own, 1.0, 0.0)
        count = tl.sum(rest, 0)
        tl.store(statistics_ptr + MEAN * stride + row, tl.sum(total, 0) / tl.maximum(count, 1.0))
        tl.store(statistics_ptr + REST * stride + row, count)


@kernel
def _finish_kernel(
    target_ptr,  # int64 [n]
    statistics_ptr,  # fp32 [5, n]
    loss_ptr,  # fp32 [n]
    log_prob_ptr,  # fp32 [n]
    lse_ptr,  # fp32 [n]
    rows,  # n
    smoothing,
    BLOCK: tl.constexpr,
):
    """(D3) loss, log p(w) and lse; ignored rows: zeros."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = wide(rows)
    mask = row < rows
    counted = mask & (tl.load(target_ptr + row, mask=mask, other=IGNORED) != IGNORED)
    at_ptr = statistics_ptr + row
    top = tl.load(at_ptr + TOP * stride, mask=counted, other=0.0)
    others = tl.load(at_ptr + OTHERS * stride, mask=counted, other=1.0)
    own = tl.load(at_ptr + OWN * stride, mask=counted, other=0.0) - top
    mean = tl.load(at_ptr + MEAN * stride, mask=counted, other=0.0)
    rest = tl.load(at_ptr + REST * stride, mask=counted, other=0.0)

    some = others > 0.0
    odds = tl.log(tl.where(some, others, 1.0)) - own  # log of (1 - p) / p
    small = tl.exp(-tl.abs(odds))
    one = 1.0 + small  # log1p(small) = log(one) small / (one - 1), and small where one is 1
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1)))
    # A NaN must reach the loss, so the test is for zero and not for positive.
    log_prob = tl.where(others == 0.0, 0.0, -(tl.maximum(odds, 0.0) + log1p))
    log_prob = tl.where(others != others, others, log_prob)
    log_sum = tl.log(others + tl.exp(own))
    b = tl.where(rest > 0.0, smoothing, 0.0)
    loss = -log_prob
    loss = tl.where(rest > 0.0, (1.0 - b) * loss - b * (mean - log_sum), loss)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=mask)
    tl.store(log_prob_ptr + row, tl.where(counted, log_prob, 0.0), mask=mask)
    tl.store(lse_ptr + row, tl.where(counted, top + log_sum, 0.0), mask=mask)


@helper
def _row_gradient(row, stride, statistics_ptr, dloss_ptr, dlog_prob_ptr, dlse_ptr, smoothing):
    """top; the gradient per exp(z - top) of labels other than w; that of w; b dloss / rest."""
    dloss = tl.load(dloss_ptr + row)
    rest = tl.load(statistics_ptr + REST * stride + row)
    top = tl.load(statistics_ptr + TOP * stride + row)
    others = tl.load(statistics_ptr + OTHERS * stride + row)
    own = tl.exp(tl.load(statistics_ptr + OWN * stride + row) - top)
    b = tl.where(rest > 0.0, smoothing, 0.0)
    along_lse = tl.load(dlse_ptr + row) + b * dloss
    along_log_prob = tl.load(dlog_prob_ptr + row) - (1.0 - b) * dloss
    total = others + own
    at_own = (along_log_prob * others + along_lse * own) / total  # 1 - p as others / total
    return top, (along_lse - along_log_prob) / total, at_own, b * dloss / tl.maximum(rest, 1.0)


@kernel
def _gradient_kernel(
    z,  # `Logits`
    target_ptr,  # int64 [n]
    statistics_ptr,  # fp32 [5, n]
    dloss_ptr,  # fp32 [n]
    dlog_prob_ptr,  # fp32 [n]
    dlse_ptr,  # fp32 [n]
    dlogits_ptr,  # [n, V] in the operands' dtype
    rows,  # n
    blocks,
    smoothing,
    BLOCK: tl.constexpr,
):
    """The gradient of one row's logits over one block of the vocabulary, before bags."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < z.V
    out_ptr = dlogits_ptr + row * z.V + columns
    own = tl.load(target_ptr + row)
    if own == IGNORED:
        tl.store(out_ptr, tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty), mask=mask)
    else:
        top, scale, at_own, _ = _row_gradient(
            row, wide(rows), statistics_ptr, dloss_ptr, dlog_prob_ptr, dlse_ptr, smoothing
        )
        y, raw = _load_logits(z, row, columns, mask)
        dy = tl.where(columns == own, at_own, scale * tl.exp(y - top))
        dz = uncapped_gradient(dy, raw, z.softcap)
        tl.store(out_ptr, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@kernel
def _bag_gradient_kernel(
    z,  # `Logits`
    bags,  # `Bags`, the labels sorted within each bag
    target_ptr,  # int64 [n]
    index_ptr,  # int64 [n]
    statistics_ptr,  # fp32 [5, n]
    dloss_ptr,  # fp32 [n]
    dlog_prob_ptr,  # fp32 [n]
    dlse_ptr,  # fp32 [n]
    dlogits_ptr,  # [n, V]
    rows,  # n
    smoothing,
    BLOCK: tl.constexpr,
):
    """(D3) overwrites the gradient at the labels of one row's bag: each once, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(target_ptr + row)
    bag = tl.load(index_ptr + row)
    if (own != IGNORED) & (bag >= 0):
        top, scale, _, pull = _row_gradient(
            row, wide(rows), statistics_ptr, dloss_ptr, dlog_prob_ptr, dlse_ptr, smoothing
        )
        stop = tl.load(bags.offsets + bag + 1)
        for at in range(tl.load(bags.offsets + bag), stop, BLOCK):
            i = at + tl.arange(0, BLOCK)
            label = tl.load(bags.labels + i, mask=i < stop, other=own)
            copies = tl.load(bags.copies + i, mask=i < stop, other=0.0)
            here = (label != own) & (label >= 0) & (label < z.V) & (copies > 0.0)
            y, raw = _load_logits(z, row, label, here)
            dy = scale * tl.exp(y - top) - pull * copies
            dz = uncapped_gradient(dy, raw, z.softcap)
            out_ptr = dlogits_ptr + row * z.V + label
            tl.store(out_ptr, dz.to(dlogits_ptr.dtype.element_ty), mask=here)
