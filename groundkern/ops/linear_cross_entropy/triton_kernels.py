"""The Triton kernels of linear cross entropy: what happens to one chunk of logits in memory.

One program takes a row from its logits to its results and, if they are wanted, to its gradient,
which overwrites the logits. The second read finds them in the L2 cache: there are as many programs
as processors, so that no more rows than that are under way.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern.head_kernels import blank, exponential, load_logits, load_row
from groundkern.head_statistics_kernels import STAGES, class_weights, combined, row_statistics
from groundkern.tile_kernels import uncapped_gradient, wide
from groundkern.tiles import helper, kernel


class Lists(NamedTuple):
    """Labels sorted within each list; all None: there are no lists.

    (Triton 3.6.0 cannot compare a tuple with None in it with None, so that absent groups of
    arguments are tuples of None here.)
    """

    labels: Tensor | None = None  # int64 [T]
    weights: Tensor | None = (
        None  # fp32 [T]: of all copies of a label at one of them, 0 at the others
    )
    copies: Tensor | None = None  # fp32 [T], how many there are, likewise; None: the weights
    offsets: Tensor | None = None  # int64 [G + 1]
    index: Tensor | None = None  # int64 [n] from row to list, -1: none


class Targets(NamedTuple):
    """What a row's loss is made of (see `reference`); absent numbers are None."""

    label: Tensor  # int64 [n], the own one
    ignore_index: int
    first: int  # the label of this shard's first column
    own: Tensor | None  # fp32 [n]
    class_weight: Tensor | None  # fp32 [V]
    smoothing: float | None
    unsmoothed: float  # 1 - label_smoothing
    share: float | None  # label_smoothing / the whole vocabulary
    z_loss: float


class Results(NamedTuple):
    """Each [n]; all None: not wanted."""

    loss: Tensor | None = None
    log_prob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    predicted: Tensor | None = None


class Upstream(NamedTuple):
    """Each fp32 [n]; None: 0, of dloss 1."""

    dloss: Tensor | None = None
    dlog_prob: Tensor | None = None
    dlse: Tensor | None = None
    dentropy: Tensor | None = None


@helper
def _optional(ptr, at, otherwise):
    value = otherwise
    if ptr is not None:
        value = tl.load(ptr + at)
    return value


@helper
def _column(z, targets, label):
    """The label's column in this shard, or -1."""
    column = label - targets.first
    return tl.where((column >= 0) & (column < z.V), column, -1).to(tl.int32)


@kernel
def _statistics_kernel(
    z,  # `Logits`
    targets,  # `Targets`
    parts_ptr,  # fp32 [6, n]
    ids_ptr,  # int64 [n]
    rows,  # n
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of each row over this rank's shard of the vocabulary."""
    stride = wide(rows)
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=1):
        row = wide(n)
        label = tl.load(targets.label + row)
        if label != targets.ignore_index:
            own = _column(z, targets, label)
            of_own, _, before = blank(z, row, tl.maximum(own, 0), own >= 0)
            statistics, predicted = row_statistics(z, targets, row, own, of_own, ENTROPY, BLOCK)
            for i in tl.static_range(6):
                tl.store(parts_ptr + i * stride + row, statistics[i])
            tl.store(ids_ptr + row, predicted)
            tl.debug_barrier()
            tl.store(z.x + row * z.stride + tl.maximum(own, 0), before, mask=own >= 0)


@helper
def _listed(z, targets, lists, at, stop, label, BLOCK: tl.constexpr):
    """Some labels of a list: their places, columns in this shard, which of them are not the row's
    own, and weights of these."""
    i = at + tl.arange(0, BLOCK)
    y = tl.load(lists.labels + i, mask=i < stop, other=label)
    other = y != label
    return i, _column(z, targets, y), other, tl.load(lists.weights + i, mask=other, other=0.0)


@helper
def _list_sums(z, targets, lists, row, own, top, READ: tl.constexpr, BLOCK: tl.constexpr):
    """Of the labels of the row's list other than its own: the sum of weight times x - top over
    those in this shard (if READ), that of the weights, and how many there are."""
    total, weight = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    which = tl.load(lists.index + row)
    if which >= 0:
        stop = tl.load(lists.offsets + which + 1)
        for at in range(tl.load(lists.offsets + which), stop, BLOCK):
            i, column, other, w = _listed(z, targets, lists, at, stop, own, BLOCK)
            weight += w
            copies = w
            if lists.copies is not None:
                copies = tl.load(lists.copies + i, mask=other, other=0.0)
            rest += copies
            if READ:
                here = other & (column >= 0)
                x = load_logits(z, row, tl.maximum(column, 0), here)[0]
                total += tl.where(here, w * (x - top), 0.0)
    return tl.sum(total, 0), tl.sum(weight, 0), tl.sum(rest, 0)


@kernel
def _list_kernel(
    z,  # `Logits`
    targets,  # `Targets`
    lists,  # `Lists`
    shards,  # `Shards`
    totals_ptr,  # fp32 [n]
    rows,  # n
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What this shard adds to the lists' totals."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(targets.label + row)
    total = 0.0
    if label != targets.ignore_index:
        statistics = combined(z, shards, row, wide(rows), RANKS)[0]
        total = _list_sums(z, targets, lists, row, label, statistics[0], True, BLOCK)[0]
    tl.store(totals_ptr + row, total)


@helper
def _log_probability(others, own):
    """-log(1 + others / exp(own)), where own is below the top: nothing cancels as p -> 1."""
    some = others > 0.0
    odds = tl.log(tl.where(some, others, 1.0)) - own  # log of (1 - p) / p
    small = tl.exp(-tl.abs(odds))
    one = 1.0 + small  # log1p(small) = log(one) small / (one - 1), and small where one is 1
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1)))
    # A NaN must reach the loss, so the test is for zero and not for positive.
    log_prob = tl.where(others == 0.0, 0.0, -(tl.maximum(odds, 0.0) + log1p))
    return tl.where(others != others, others, log_prob)


@helper
def _row_weights(targets, row, rest):
    """What -log p counts for: of the own label, and of a list's label of weight 1."""
    of_own = targets.unsmoothed * _optional(targets.own, row, 1.0)
    pull = targets.unsmoothed
    if targets.smoothing is not None:
        of_own = tl.where(rest > 0.0, (1.0 - targets.smoothing) * of_own, of_own)
        pull = targets.unsmoothed * targets.smoothing / tl.maximum(rest, 1.0)
    return of_own, pull


@helper
def _ignored(z, row, results, dlogits_ptr, BLOCK: tl.constexpr):
    """The results and the gradient of a row that does not count."""
    if results.loss is not None:
        tl.store(results.loss + row, 0.0)
        tl.store(results.log_prob + row, 0.0)
        tl.store(results.lse + row, 0.0)
        tl.store(results.predicted + row, tl.full((), -1, tl.int64))
        if results.entropy is not None:
            tl.store(results.entropy + row, 0.0)
    if dlogits_ptr is not None:
        for at in range(0, z.V, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + row * z.stride + columns, zeros, mask=columns < z.stride)


@helper
def _along(upstream, targets, row, sums, sharpness):
    """What one row's gradient over the temperature is made of: along -log p of the own label, along
    lse, along the entropy; that of a list's label of weight 1; that of every label of class weight
    1."""
    own_share, pull, weight, mass, lse = sums
    dloss = _optional(upstream.dloss, row, 1.0)
    own = own_share * dloss - _optional(upstream.dlog_prob, row, 0.0)
    of_lse = dloss * (pull * weight + 2.0 * targets.z_loss * lse)
    of_lse += _optional(upstream.dlse, row, 0.0)
    uniform = 0.0
    if targets.share is not None:
        uniform = dloss * targets.share
        of_lse += uniform * mass
    of_entropy = _optional(upstream.dentropy, row, 0.0)
    s = sharpness
    return own * s, of_lse * s, of_entropy * s, dloss * pull * s, uniform * s


@kernel
def _row_kernel(
    z,  # `Logits`
    targets,  # `Targets`
    lists,  # `Lists`
    shards,  # `Shards`
    results,  # `Results`
    upstream,  # `Upstream`
    dlogits_ptr,  # [n, stride], may be the logits; None: no gradient
    stash_ptr,  # fp32 [programs, longest list], with lists and upstream
    longest,
    rows,  # n
    ENTROPY: tl.constexpr,
    RANKS: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Results and gradient of each row."""
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=1):
        row = wide(n)
        label = tl.load(targets.label + row)
        if label == targets.ignore_index:
            _ignored(z, row, results, dlogits_ptr, BLOCK)
        else:
            own = _column(z, targets, label)
            of_own, raw_own, _ = blank(z, row, tl.maximum(own, 0), own >= 0)
            if shards.parts is None:
                statistics, predicted = row_statistics(z, targets, row, own, of_own, ENTROPY, BLOCK)
            else:
                statistics, predicted = combined(z, shards, row, wide(rows), RANKS)
            top, others, best_own, moment, weighted, mass = statistics
            total, weight, rest = 0.0, 0.0, 0.0
            if lists.labels is not None:
                alone: tl.constexpr = shards.parts is None
                total, weight, rest = _list_sums(z, targets, lists, row, label, top, alone, LABELS)
                if shards.parts is not None:
                    total = tl.load(shards.totals + row)
            own_share, pull = _row_weights(targets, row, rest)
            below = (best_own - top) * z.sharpness
            log_prob = _log_probability(others, below)
            total_e = others + tl.exp(below)
            log_sum = tl.log(total_e)
            lse = top * z.sharpness + log_sum
            entropy = log_sum - moment * z.sharpness / total_e
            if results.loss is not None:
                loss = -own_share * log_prob + pull * (weight * log_sum - total * z.sharpness)
                if targets.share is not None:
                    loss += targets.share * (mass * log_sum - weighted * z.sharpness)
                tl.store(results.loss + row, loss + targets.z_loss * lse * lse)
                tl.store(results.log_prob + row, log_prob)
                tl.store(results.lse + row, lse)
                tl.store(results.predicted + row, predicted)
                if results.entropy is not None:
                    tl.store(results.entropy + row, entropy)
            if dlogits_ptr is not None:
                sums = own_share, pull, weight, mass, lse
                along_own, along_lse, dentropy, of_label, uniform = _along(
                    upstream, targets, row, sums, z.sharpness
                )
                at_own = along_lse - dentropy * (log_prob + entropy)  # 1 - p as others / total_e
                at_own = (at_own * tl.exp(below) - along_own * others) / total_e
                scale = (along_own + along_lse) / total_e
                terms = top, scale, dentropy / total_e, entropy - log_sum, uniform
                out_ptr = dlogits_ptr + row * z.stride
                _write_gradient(
                    z,
                    targets,
                    lists,
                    row,
                    label,
                    terms,
                    of_label,
                    out_ptr,
                    stash_ptr,
                    longest,
                    upstream.dentropy is not None,
                    LABELS,
                    BLOCK,
                )
                if targets.share is not None:
                    at_own -= uniform * class_weights(targets, tl.maximum(own, 0), own >= 0)
                dz = uncapped_gradient(at_own, raw_own, z.softcap).to(dlogits_ptr.dtype.element_ty)
                tl.store(out_ptr + tl.maximum(own, 0), dz, mask=own >= 0)


@helper
def _logit_gradient(z, targets, x, columns, mask, terms, ENTROPY: tl.constexpr):
    """The gradient of capped logits other than the own label's, before lists."""
    top, scale, of_entropy, offset, uniform = terms
    dy = scale
    if ENTROPY:  # log p + entropy; where x is -inf, p is 0
        dy = scale - of_entropy * (tl.maximum((x - top) * z.sharpness, -1e4) + offset)
    dy = dy * exponential(x, top, z.sharpness)
    if targets.share is not None:
        dy -= uniform * class_weights(targets, columns, mask)
    return dy


@helper
def _write_piece(
    z,
    targets,
    row,
    at,
    terms,
    out_ptr,
    ENDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, raw, columns = load_row(z, row, at, ENDS, BLOCK)
    dy = _logit_gradient(z, targets, x, columns, columns < z.V, terms, ENTROPY)
    dz = uncapped_gradient(dy, raw, z.softcap).to(out_ptr.dtype.element_ty)
    if ENDS:
        tl.store(out_ptr + columns, dz, mask=columns < z.stride)
    else:
        tl.store(out_ptr + columns, dz)


@helper
def _write_gradient(
    z,
    targets,
    lists,
    row,
    label,
    terms,
    of_label,
    out_ptr,
    stash_ptr,
    longest,
    ENTROPY: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's gradient but at its own label. That of a list's labels is made before their logits
    are overwritten, kept in the stash, and written last: each once, rounded once."""
    start, stop = wide(0), wide(0)
    if lists.labels is not None:
        stash_ptr += tl.program_id(0) * wide(longest)
        which = tl.load(lists.index + row)
        if which >= 0:
            start, stop = tl.load(lists.offsets + which), tl.load(lists.offsets + which + 1)
        for at in range(start, stop, LABELS):
            i, column, other, w = _listed(z, targets, lists, at, stop, label, LABELS)
            here = other & (column >= 0)
            x, raw = load_logits(z, row, tl.maximum(column, 0), here)
            dy = _logit_gradient(z, targets, x, column, here, terms, ENTROPY) - of_label * w
            tl.store(stash_ptr + i - start, uncapped_gradient(dy, raw, z.softcap), mask=here)
    tl.debug_barrier()  # all have read before any writes
    whole = z.V // BLOCK * BLOCK
    for at in tl.range(0, whole, BLOCK, num_stages=STAGES):
        _write_piece(z, targets, row, at, terms, out_ptr, False, ENTROPY, BLOCK)
    if whole < z.V:
        _write_piece(z, targets, row, whole, terms, out_ptr, True, ENTROPY, BLOCK)
    tl.debug_barrier()
    if lists.labels is not None:
        for at in range(start, stop, LABELS):
            i, column, other, w = _listed(z, targets, lists, at, stop, label, LABELS)
            here = other & (column >= 0)
            dz = tl.load(stash_ptr + i - start, mask=here, other=0.0)
            tl.store(out_ptr + column, dz.to(out_ptr.dtype.element_ty), mask=here & (w > 0.0))
