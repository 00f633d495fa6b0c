"""The Triton kernels of linear cross entropy: what happens to one chunk of logits in memory.

Per row, with w its label:  top = max_y z_y,  others = sum_{y != w} exp(z_y - top),  own = z_w.
`others` is kept apart from w's own term, so neither log p nor its gradient cancels as p -> 1, and
nothing but differences to `top` is ever exponentiated.
"""

from dataclasses import dataclass

import triton.language as tl

from groundkern.tiles import helper, kernel, wide


@dataclass(frozen=True)
class Tiles:
    columns: int  # vocabulary entries of one program
    labels: int  # of a bag, per step
    rows: int  # of one program of finish_kernel
    warps: int  # of the programs over columns; the others use Triton's default


# Untuned first guess for every device: no measurement stands behind it.
TILES = Tiles(columns=8192, labels=128, rows=128, warps=8)

IGNORED = tl.constexpr(-(2**62))  # `own` of an ignored row
# Rows of the statistics [5, n]; `rest` counts the bag's labels other than w.
TOP, OTHERS, OWN, MEAN, REST = (tl.constexpr(i) for i in range(5))


@helper
def _load_logits(
    logits_ptr,
    bias_ptr,
    offset,  # of the row, int64
    columns,
    mask,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z = softcap(x + bias), -inf outside the mask, and dz/dx."""
    x = tl.load(logits_ptr + offset + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        x = x / softcap
        near = tl.abs(x) < 0.5
        s = x * x  # tanh's series, where 1 - e would cancel
        t = -17 / 315 + s * (62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075)))
        t = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * t)))
        e = tl.exp(-2.0 * tl.abs(x))
        tail = (1.0 - e) / (1.0 + e)
        slope = tl.where(near, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))  # 1 - tanh^2
        x = tl.where(near, t, tl.where(x < 0, -tail, tail)) * softcap
    return tl.where(mask, x, float("-inf")), slope


@kernel
def partial_kernel(
    logits_ptr,  # [n, V] fp32
    bias_ptr,  # [V]
    target_ptr,  # [n] int64: column of the row's label, not in [0, V) when it is elsewhere
    parts_ptr,  # [3, n, spans] fp32: top, others, own
    ids_ptr,  # [n, spans] int64
    rows,
    vocabulary,
    spans,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of one row over one span of the vocabulary."""
    program = tl.program_id(0).to(tl.int64)
    row = program // spans
    own = tl.load(target_ptr + row)
    if own != IGNORED:
        columns = (program % spans) * BLOCK + tl.arange(0, BLOCK)
        z, _ = _load_logits(
            logits_ptr,
            bias_ptr,
            row * vocabulary,
            columns,
            columns < vocabulary,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        top = tl.max(z, 0)
        e = tl.where(columns == own, 0.0, tl.exp(z - top))
        part_ptr = parts_ptr + program
        part = wide(rows) * spans
        tl.store(part_ptr, top)
        tl.store(part_ptr + part, tl.sum(e, 0))
        tl.store(part_ptr + 2 * part, tl.max(tl.where(columns == own, z, float("-inf")), 0))
        first = tl.min(tl.where(z == top, columns, vocabulary - 1), 0)
        tl.store(ids_ptr + program, first.to(tl.int64))


@kernel
def combine_kernel(
    parts_ptr,  # [3, n, parts]
    ids_ptr,  # [n, parts]
    target_ptr,  # [n]
    statistics_ptr,  # [5, n]
    predicted_ptr,  # [n] int64
    rows,
    parts,
    BLOCK: tl.constexpr,
):
    """One row's statistics from those of its parts, in order: spans, or ranks."""
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
def bag_kernel(
    logits_ptr,  # [n, V]
    bias_ptr,
    target_ptr,  # [n]
    labels_ptr,  # [T] int64: columns, grouped by bag
    offsets_ptr,  # [G + 1] int64
    index_ptr,  # [n] int64: bag of each row, -1: none
    statistics_ptr,  # [5, n]: reads TOP, writes MEAN and REST
    rows,
    vocabulary,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(D3) mean_{y in Y, y != w} z_y - top of one row, over the labels in this weight."""
    row = tl.program_id(0).to(tl.int64)
    stride = wide(rows)
    own = tl.load(target_ptr + row)
    bag = tl.load(index_ptr + row)
    if (own != IGNORED) & (bag >= 0):
        top = tl.load(statistics_ptr + TOP * stride + row)
        start = tl.load(offsets_ptr + bag)
        stop = tl.load(offsets_ptr + bag + 1)
        total = tl.zeros((BLOCK,), tl.float32)
        rest = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, stop, BLOCK):
            i = at + tl.arange(0, BLOCK)
            label = tl.load(labels_ptr + i, mask=i < stop, other=own)
            here = (label != own) & (label >= 0) & (label < vocabulary)
            z, _ = _load_logits(
                logits_ptr,
                bias_ptr,
                row * vocabulary,
                label,
                here,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
            )
            total += tl.where(here, z - top, 0.0)
            rest += tl.where(label != own, 1.0, 0.0)
        count = tl.sum(rest, 0)
        tl.store(statistics_ptr + MEAN * stride + row, tl.sum(total, 0) / tl.maximum(count, 1.0))
        tl.store(statistics_ptr + REST * stride + row, count)


@kernel
def finish_kernel(
    target_ptr,  # [n]
    statistics_ptr,  # [5, n]
    loss_ptr,  # [n] fp32, as the next two
    log_prob_ptr,
    lse_ptr,
    rows,
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
def gradient_kernel(
    logits_ptr,  # [n, V]
    bias_ptr,
    target_ptr,  # [n]
    statistics_ptr,  # [5, n]
    dloss_ptr,  # [n] fp32, as the next two
    dlog_prob_ptr,
    dlse_ptr,
    dlogits_ptr,  # [n, V] in the operands' dtype
    rows,
    vocabulary,
    spans,
    smoothing,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one row's logits over one span, as if no label were in a bag."""
    program = tl.program_id(0).to(tl.int64)
    row = program // spans
    columns = (program % spans) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    out_ptr = dlogits_ptr + row * vocabulary + columns
    own = tl.load(target_ptr + row)
    if own == IGNORED:
        tl.store(out_ptr, tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty), mask=mask)
    else:
        top, scale, at_own, _ = _row_gradient(
            row,
            wide(rows),
            statistics_ptr,
            dloss_ptr,
            dlog_prob_ptr,
            dlse_ptr,
            smoothing,
        )
        z, slope = _load_logits(
            logits_ptr,
            bias_ptr,
            row * vocabulary,
            columns,
            mask,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        dz = tl.where(columns == own, at_own, scale * tl.exp(z - top)) * slope
        tl.store(out_ptr, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@kernel
def bag_gradient_kernel(
    logits_ptr,  # [n, V]
    bias_ptr,
    target_ptr,  # [n]
    labels_ptr,  # [T] int64, sorted within each bag
    copies_ptr,  # [T] fp32: how often the bag holds this label; 0 at all copies but the first
    offsets_ptr,  # [G + 1]
    index_ptr,  # [n]
    statistics_ptr,  # [5, n]
    dloss_ptr,  # [n], as the next two
    dlog_prob_ptr,
    dlse_ptr,
    dlogits_ptr,  # [n, V]
    rows,
    vocabulary,
    smoothing,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(D3) writes the gradient at the labels of one row's bag anew: each once, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(target_ptr + row)
    bag = tl.load(index_ptr + row)
    if (own != IGNORED) & (bag >= 0):
        top, scale, _, pull = _row_gradient(
            row,
            wide(rows),
            statistics_ptr,
            dloss_ptr,
            dlog_prob_ptr,
            dlse_ptr,
            smoothing,
        )
        stop = tl.load(offsets_ptr + bag + 1)
        for at in range(tl.load(offsets_ptr + bag), stop, BLOCK):
            i = at + tl.arange(0, BLOCK)
            label = tl.load(labels_ptr + i, mask=i < stop, other=own)
            copies = tl.load(copies_ptr + i, mask=i < stop, other=0.0)
            here = (label != own) & (label >= 0) & (label < vocabulary) & (copies > 0.0)
            z, slope = _load_logits(
                logits_ptr,
                bias_ptr,
                row * vocabulary,
                label,
                here,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
            )
            dz = (scale * tl.exp(z - top) - pull * copies) * slope
            out_ptr = dlogits_ptr + row * vocabulary + label
            tl.store(out_ptr, dz.to(dlogits_ptr.dtype.element_ty), mask=here)
