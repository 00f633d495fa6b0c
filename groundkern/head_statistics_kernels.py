"""The statistics of one row of logits, over one shard of the vocabulary or all of them.

With w the row's own label, x the capped logits and z = x / temperature:

    top = max_y x_y,  own = x_w,  others = sum_{y != w} exp(z_y - top / temperature)
    moment = sum_y exp(z_y - top / temperature) (x_y - top)                     for the entropy
    weighted = sum_y c_y (x_y - top),  mass = sum_y c_y                         for label smoothing

`others` is kept apart from w's own term, so that neither log p nor its gradient cancels as p -> 1,
and only differences to `top` are exponentiated. For that the own logit is read first and -inf
written in its place (`blank`): no other entry is compared with the label.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern.head_kernels import exponential, load_row
from groundkern.tiles import helper

# Rows of the statistics [6, n].
TOP, OTHERS, OWN, MOMENT, WEIGHTED, MASS = (tl.constexpr(i) for i in range(6))
STAGES = tl.constexpr(4)  # pieces of a row: three are loaded while one is computed


class Shards(NamedTuple):
    """Of every rank; totals of lists are summed over ranks. Without parts there is one shard."""

    parts: Tensor | None = None  # fp32 [ranks, 6, n]
    ids: Tensor | None = None  # int64 [ranks, n]
    totals: Tensor | None = None  # fp32 [n]
    ranks: int = 1


@helper
def class_weights(targets, columns, mask):
    weights = 1.0
    if targets.class_weight is not None:
        weights = tl.load(targets.class_weight + columns, mask=mask, other=0.0)
    return weights


@helper
def _add_piece(
    z, targets, row, own, at, state, ENDS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """The statistics with one more piece of the row."""
    top, place, start, others, moment, weighted, mass = state
    x, _, columns = load_row(z, row, at, ENDS, BLOCK)
    highest = tl.max(x, 0)
    place = tl.where(highest > top, at, place)
    higher = tl.maximum(top, highest)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    moved = tl.where(top == float("-inf"), 0.0, top - shift)
    shrunk = tl.where(top == float("-inf"), 0.0, exponential(moved, 0.0, z.sharpness))
    e = exponential(x, shift, z.sharpness)
    if ENTROPY:  # where x is -inf, e is 0
        moment = (moment + others * moved) * shrunk + e * tl.maximum(x - shift, -1e30)
    others = others * shrunk + e
    if targets.share is not None:
        start = tl.where(at == 0, shift, start)
        counted = columns != own
        if ENDS:
            counted = counted & (columns < z.V)
        c = class_weights(targets, columns, columns < z.V)
        weighted += tl.where(counted, c * (x - start), 0.0)
        if targets.class_weight is not None:
            mass += c
    return higher, place, start, others, moment, weighted, mass


@helper
def row_statistics(z, targets, row, own, of_own, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """The statistics of one row of this shard, whose own logit is blanked, and its likeliest
    column.

    own: the own label's column, -1 on another shard. of_own: its logit, -inf there.
    """
    lowest = tl.full((), float("-inf"), tl.float32)
    zeros = tl.zeros((BLOCK,), tl.float32)
    place, start = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    state = lowest, place, start, zeros, zeros, zeros, zeros
    whole = z.V // BLOCK * BLOCK
    for at in tl.range(0, whole, BLOCK, num_stages=STAGES):
        state = _add_piece(z, targets, row, own, at, state, False, ENTROPY, BLOCK)
    if whole < z.V:
        state = _add_piece(z, targets, row, own, whole, state, True, ENTROPY, BLOCK)
    below, place, start, others, moment, weighted, mass = state

    x, _, columns = load_row(z, row, place, True, BLOCK)
    predicted = tl.min(tl.where(x == below, columns, z.V - 1), 0)
    predicted = tl.where((of_own == below) & (own >= 0), tl.minimum(own, predicted), predicted)
    predicted = tl.where(of_own > below, own, predicted)

    top = tl.maximum(below, of_own)
    moved = tl.where(below == float("-inf"), 0.0, below - top)
    shrunk = tl.where(below == float("-inf"), 0.0, exponential(moved, 0.0, z.sharpness))
    of_others = tl.sum(others, 0)
    moment_of_all, weighted_of_all, mass_of_all = 0.0, 0.0, 0.0
    if ENTROPY:
        moment_of_all = (tl.sum(moment, 0) + of_others * moved) * shrunk
        down = tl.where(own >= 0, of_own - top, 0.0)
        moment_of_all += tl.where(own >= 0, exponential(down, 0.0, z.sharpness) * down, 0.0)
    if targets.share is not None:
        mass_of_all = z.V * 1.0
        if targets.class_weight is not None:
            mass_of_all = tl.sum(mass, 0)
        c = class_weights(targets, tl.maximum(own, 0), own >= 0)
        weighted_of_all = tl.sum(weighted, 0) + tl.where(own >= 0, c * (of_own - start), 0.0)
        weighted_of_all += mass_of_all * (start - top)
    statistics = top, of_others * shrunk, of_own, moment_of_all, weighted_of_all, mass_of_all
    return statistics, predicted.to(tl.int64)


@helper
def combined(z, shards, row, stride, BLOCK: tl.constexpr):
    """One row's statistics and likeliest id from those of all ranks, in order."""
    rank = tl.arange(0, BLOCK)
    mask = rank < shards.ranks
    at_ptr = shards.parts + rank * 6 * stride + row
    tops = tl.load(at_ptr + TOP * stride, mask=mask, other=float("-inf"))
    others = tl.load(at_ptr + OTHERS * stride, mask=mask, other=0.0)
    owns = tl.load(at_ptr + OWN * stride, mask=mask, other=float("-inf"))
    moments = tl.load(at_ptr + MOMENT * stride, mask=mask, other=0.0)
    of_labels = tl.load(at_ptr + WEIGHTED * stride, mask=mask, other=0.0)
    masses = tl.load(at_ptr + MASS * stride, mask=mask, other=0.0)
    ids = tl.load(shards.ids + rank * stride + row, mask=mask, other=2**62)
    top = tl.max(tops, 0)
    some = tops > float("-inf")  # of this shard's logits
    moved = tl.where(some, tops - top, 0.0)
    shrunk = exponential(moved, 0.0, z.sharpness)
    sums = others + exponential(owns, tl.where(some, tops, 0.0), z.sharpness)
    moment = tl.sum((moments + sums * moved) * shrunk, 0)
    weighted = tl.sum(of_labels + masses * moved, 0)
    predicted = tl.min(tl.where(mask & (tops == top), ids, 2**62), 0)
    of_others = tl.sum(others * shrunk, 0)
    return (top, of_others, tl.max(owns, 0), moment, weighted, tl.sum(masses, 0)), predicted
