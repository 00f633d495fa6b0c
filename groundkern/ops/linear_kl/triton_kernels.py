"""The Triton kernels of linear KL: what happens to one chunk of both heads' logits in memory. One
program computes one row.

Of each head a first pass finds the largest logit `top`, its entry `own` and
others = sum_{y != own} exp(z_y - top), so that log p_own = -log1p(others) and nothing cancels as
p_own -> 1. A second pass compares the two; the gradient (T4) of the two kinds that need a mean over
the student is written by a third.
"""

import triton.language as tl

from groundkern.head_kernels import expm1, load_logits, log1p
from groundkern.tile_kernels import uncapped_gradient, wide
from groundkern.tiles import helper, kernel

FORWARD, REVERSE, JS = (tl.constexpr(i) for i in range(3))
# Rows of the statistics fp32 [5, n]; TEACHER_AT is the teacher's logit at the student's `own`.
TOP, OTHERS, TEACHER_TOP, TEACHER_OTHERS, TEACHER_AT = (tl.constexpr(i) for i in range(5))


@helper
def _largest(z, row, sharpness, BLOCK: tl.constexpr):
    """top, own and others of one row; own is the first entry of the largest logit."""
    top = tl.full((), float("-inf"), tl.float32)
    own = tl.full((), 0, tl.int32)
    others = tl.full((), 0.0, tl.float32)
    for first in range(0, z.V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        y, _ = load_logits(z, row, columns, columns < z.V)
        y = y * sharpness
        here = tl.max(y, 0)
        at = tl.min(tl.where(y == here, columns, z.V - 1), 0)
        shift = tl.where(here == float("-inf"), 0.0, here)
        rest = tl.sum(tl.where(columns == at, 0.0, tl.exp(y - shift)), 0)
        higher = here > top
        new = tl.maximum(top, here)
        shift = tl.where(new == float("-inf"), 0.0, new)
        before, now = tl.exp(top - shift), tl.exp(here - shift)
        others = others * before + rest * now + tl.where(higher, before, now)
        own = tl.where(higher, at, own)
        top = new
    return top, own, others


@helper
def _times(p, x):
    """p x, 0 where p is: x may be infinite there."""
    return tl.where(p == 0.0, 0.0, p * x)


@helper
def _compared(a, b, beta, KIND: tl.constexpr):
    """Of log s = a and log t = b: the terms of (T2) or (T3), s, s - t, and the log-ratio whose
    distance from its mean over s is the gradient."""
    s, t = tl.exp(a), tl.exp(b)
    ratio = tl.where((s == 0.0) & (t == 0.0), 0.0, b - a)
    rest = expm1(-tl.abs(ratio))  # min(s, t) / max(s, t) - 1
    difference = tl.where(ratio > 0.0, t, -s) * rest  # s - t
    if KIND == FORWARD:
        terms = difference + _times(t, ratio)
    elif KIND == REVERSE:
        ratio = -ratio
        terms = _times(s, ratio) - difference
    else:
        rest = log1p(tl.where(ratio > 0.0, 1.0 - beta, beta) * rest)  # log(m / max(s, t))
        terms = beta * _times(t, tl.minimum(ratio, 0.0) - rest)
        ratio = -tl.maximum(ratio, 0.0) - rest  # log(s / m)
        terms += (1.0 - beta) * _times(s, ratio)
    return terms, s, difference, ratio


@helper
def _norms(
    top,
    others,
    own,
    teacher_top,
    teacher_others,
    teacher_own,
    at,
    beta,
    KIND: tl.constexpr,
):
    """top and log-sum-exp beyond it, of the student and of the teacher; and at the student's
    likeliest entry the log-ratio, and s - t from the others' shares. `at`: the teacher's logit
    there."""
    lse, teacher_lse = log1p(others), log1p(teacher_others)
    b = (at - teacher_top) - teacher_lse
    _, _, _, ratio = _compared(-lse, b, beta, KIND)
    share = teacher_others / (1.0 + teacher_others)
    share = tl.where(own == teacher_own, share, -expm1(b))  # of t: 1 - t
    return (top, lse, teacher_top, teacher_lse), (ratio, share - others / (1.0 + others))


@helper
def _block(z, t, row, columns, sharpness, beta, norms, KIND: tl.constexpr):
    """`_compared` at some columns of one row, and the student's raw logits."""
    mask = columns < z.V
    y, raw = load_logits(z, row, columns, mask)
    x, _ = load_logits(t, row, columns, mask)
    a, b = (y * sharpness - norms[0]) - norms[1], (x * sharpness - norms[2]) - norms[3]
    terms, s, difference, ratio = _compared(a, b, beta, KIND)
    return terms, s, difference, ratio, raw


@helper
def _sums(z, t, row, own, sharpness, beta, norms, at_own, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(T2), (T3) of one row, and the mean over s of the log-ratio beyond the one at `own`."""
    loss = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, z.V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        terms, s, _, ratio, _ = _block(z, t, row, columns, sharpness, beta, norms, KIND)
        loss += terms
        if KIND != FORWARD:
            mean += tl.where(columns == own, 0.0, _times(s, ratio - at_own[0]))
    return tl.sum(loss, 0), tl.sum(mean, 0)


@helper
def _write_gradient(
    z,
    t,
    row,
    own,
    sharpness,
    beta,
    norms,
    at_own,
    mean,
    dloss,
    dlogits_ptr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(T4) of one row; returns its loss, which "forward" needs no pass of its own for."""
    loss = tl.zeros((BLOCK,), tl.float32)
    scale = dloss * sharpness
    if KIND == JS:
        scale = scale * (1.0 - beta)
    for first in range(0, z.V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        terms, s, difference, ratio, raw = _block(z, t, row, columns, sharpness, beta, norms, KIND)
        if KIND == FORWARD:
            loss += terms
            dy = tl.where(columns == own, at_own[1], difference)
        else:
            beyond = tl.where(columns == own, 0.0, ratio - at_own[0])
            dy = _times(s, beyond - mean)
        dy = uncapped_gradient(dy * scale, raw, z.softcap)
        out_ptr = dlogits_ptr + row * z.V + columns
        tl.store(out_ptr, dy.to(dlogits_ptr.dtype.element_ty), mask=columns < z.V)
    return tl.sum(loss, 0)


@helper
def _write_zeros(row, V, dlogits_ptr, BLOCK: tl.constexpr):
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + row * V + columns, zero, mask=columns < V)


@helper
def _counts(counted_ptr, row):
    """Whether a row counts; without a mask all do."""
    counted = row >= 0
    if counted_ptr is not None:
        counted = tl.load(counted_ptr + row) != 0
    return counted


@kernel
def _row_kernel(
    z,  # `Logits` of the student
    t,  # `Logits` of the teacher
    counted_ptr,  # uint8 [n], or None: all rows count
    dloss_ptr,  # fp32 [n]
    kl_ptr,  # fp32 [n]
    dlogits_ptr,  # [n, V] in the student's dtype, or None: loss alone
    temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of one row and the gradient of its logits' product; a row that does not count: zeros."""
    row = tl.program_id(0).to(tl.int64)
    if _counts(counted_ptr, row):
        sharpness = 1.0 / temperature
        top, own, others = _largest(z, row, sharpness, BLOCK)
        teacher_top, teacher_own, teacher_others = _largest(t, row, sharpness, BLOCK)
        at, _ = load_logits(t, row, own, own >= 0)
        norms, at_own = _norms(
            top, others, own, teacher_top, teacher_others, teacher_own, at * sharpness, beta, KIND
        )
        mean = 0.0
        if (KIND != FORWARD) | (dlogits_ptr is None):
            loss, mean = _sums(z, t, row, own, sharpness, beta, norms, at_own, KIND, BLOCK)
        if dlogits_ptr is not None:
            dloss = tl.load(dloss_ptr + row)
            total = _write_gradient(
                *(z, t, row, own, sharpness, beta, norms, at_own, mean, dloss, dlogits_ptr),
                KIND,
                BLOCK,
            )
            if KIND == FORWARD:
                loss = total
        tl.store(kl_ptr + row, loss)
    else:
        tl.store(kl_ptr + row, 0.0)
        if dlogits_ptr is not None:
            _write_zeros(row, z.V, dlogits_ptr, BLOCK)


@kernel
def _statistics_kernel(
    z,  # `Logits` of the student, of this rank's part of the vocabulary
    t,  # `Logits` of the teacher
    counted_ptr,  # uint8 [n], or None
    statistics_ptr,  # fp32 [5, n]
    own_ptr,  # int64 [2, n]: likeliest column, of the student and of the teacher
    rows,  # n
    temperature,
    BLOCK: tl.constexpr,
):
    """The first pass over one row."""
    row, stride = tl.program_id(0).to(tl.int64), wide(rows)
    if _counts(counted_ptr, row):
        sharpness = 1.0 / temperature
        top, own, others = _largest(z, row, sharpness, BLOCK)
        teacher_top, teacher_own, teacher_others = _largest(t, row, sharpness, BLOCK)
        at, _ = load_logits(t, row, own, own >= 0)
        tl.store(statistics_ptr + TOP * stride + row, top)
        tl.store(statistics_ptr + OTHERS * stride + row, others)
        tl.store(statistics_ptr + TEACHER_TOP * stride + row, teacher_top)
        tl.store(statistics_ptr + TEACHER_OTHERS * stride + row, teacher_others)
        tl.store(statistics_ptr + TEACHER_AT * stride + row, at * sharpness)
        tl.store(own_ptr + row, own.to(tl.int64))
        tl.store(own_ptr + stride + row, teacher_own.to(tl.int64))
    else:
        for i in tl.static_range(5):
            tl.store(statistics_ptr + i * stride + row, 0.0)
        for i in tl.static_range(2):
            tl.store(own_ptr + i * stride + row, tl.full((), 0, tl.int64))


@helper
def _known_norms(statistics_ptr, own_ptr, row, stride, beta, KIND: tl.constexpr):
    """The student's likeliest column and `_norms`, of statistics over the whole vocabulary."""
    at_ptr = statistics_ptr + row
    own = tl.load(own_ptr + row)
    norms, at_own = _norms(
        tl.load(at_ptr + TOP * stride),
        tl.load(at_ptr + OTHERS * stride),
        own,
        tl.load(at_ptr + TEACHER_TOP * stride),
        tl.load(at_ptr + TEACHER_OTHERS * stride),
        tl.load(own_ptr + stride + row),
        tl.load(at_ptr + TEACHER_AT * stride),
        beta,
        KIND,
    )
    return own, norms, at_own


@kernel
def _sums_kernel(
    z,  # `Logits` of the student, of this rank's part of the vocabulary
    t,  # `Logits` of the teacher
    counted_ptr,  # uint8 [n], or None
    statistics_ptr,  # fp32 [5, n], of all ranks
    own_ptr,  # int64 [2, n], outside [0, V) on another rank
    sums_ptr,  # fp32 [2, n]: this part's loss, and its part of the mean
    rows,  # n
    temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second pass over one row."""
    row, stride = tl.program_id(0).to(tl.int64), wide(rows)
    if _counts(counted_ptr, row):
        own, norms, at_own = _known_norms(statistics_ptr, own_ptr, row, stride, beta, KIND)
        loss, mean = _sums(z, t, row, own, 1.0 / temperature, beta, norms, at_own, KIND, BLOCK)
        tl.store(sums_ptr + row, loss)
        tl.store(sums_ptr + stride + row, mean)
    else:
        tl.store(sums_ptr + row, 0.0)
        tl.store(sums_ptr + stride + row, 0.0)


@kernel
def _gradient_kernel(
    z,  # `Logits` of the student, of this rank's part of the vocabulary
    t,  # `Logits` of the teacher
    counted_ptr,  # uint8 [n], or None
    statistics_ptr,  # fp32 [5, n], of all ranks
    own_ptr,  # int64 [2, n], outside [0, V) on another rank
    sums_ptr,  # fp32 [2, n], of all ranks
    dloss_ptr,  # fp32 [n]
    dlogits_ptr,  # [n, V] in the student's dtype
    rows,  # n
    temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The third pass over one row."""
    row, stride = tl.program_id(0).to(tl.int64), wide(rows)
    if _counts(counted_ptr, row):
        own, norms, at_own = _known_norms(statistics_ptr, own_ptr, row, stride, beta, KIND)
        mean, dloss = tl.load(sums_ptr + stride + row), tl.load(dloss_ptr + row)
        _write_gradient(
            *(z, t, row, own, 1.0 / temperature, beta, norms, at_own, mean, dloss, dlogits_ptr),
            KIND,
            BLOCK,
        )
    else:
        _write_zeros(row, z.V, dlogits_ptr, BLOCK)
