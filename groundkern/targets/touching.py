"""Which rectangles hang together by common edges, without comparing all pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLACK = 0.01  # of the smaller of two rectangles' sides
_LARGE = 4  # times the median side: such a rectangle is compared with all others, which are few


def hanging_together(rects: Tensor, first: int | Tensor) -> Tensor:
    """The rectangles that are reached from one over common edges; a common corner is none.

    Args:
        rects: [n, 4] fp64 (x0, y0, x1, y1), all with an area; they may overlap.
        first: where it starts.

    Returns:
        bool [n].
    """
    low, high = (torch.cat(ends) for ends in zip(*_edges(rects), strict=True))
    group = torch.arange(len(rects), device=rects.device)
    while True:  # every group takes the lowest number that touches it: a few rounds, however long
        least = torch.minimum(group[low], group[high])
        joined = group.scatter_reduce(0, group[low], least, "amin")
        joined = joined.scatter_reduce(0, group[high], least, "amin")
        joined = joined[joined]
        if torch.equal(joined, group):
            return group == group[first]
        group = joined


def _edges(rects: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of rectangles with a common edge, some twice."""
    size = rects[:, 2:] - rects[:, :2]
    large = (size > _LARGE * size.median(0).values).any(1)
    every = torch.arange(len(rects), device=rects.device)
    for part in every[large].split(64):
        yield _touching(rects, part.repeat_interleave(len(rects)), every.repeat(len(part)))
    small = every[~large]
    if len(small) == 0:
        return
    # A neighbour starts in the same or an adjoining cell of a grid of larger cells than all sides.
    side = (1.0 + 2 * _SLACK) * size[small].amax(0)
    cell = ((rects[small, :2] - rects[small, :2].amin(0)) / side).floor().long()
    column, stride = cell[:, 0], int(cell[:, 1].max()) + 3
    key, order = (column * stride + cell[:, 1]).sort()
    small, column, row = small[order], column[order], cell[order, 1]
    for start in range(0, len(small), 1024):
        part = slice(start, start + 1024)
        for across in (0, 1):  # the other way round is the same pair
            middle = (column[part] + across) * stride + row[part]
            begin = torch.searchsorted(key, middle - 1)
            count = torch.searchsorted(key, middle + 1, right=True) - begin
            of = torch.arange(len(middle), device=rects.device).repeat_interleave(count)
            within = torch.arange(len(of), device=rects.device) - (count.cumsum(0) - count)[of]
            yield _touching(rects, small[part][of], small[begin[of] + within])


def _touching(rects: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the pairs that have a common edge."""
    low = torch.maximum(rects[a, :2], rects[b, :2])
    high = torch.minimum(rects[a, 2:], rects[b, 2:])
    size = rects[:, 2:] - rects[:, :2]
    slack = _SLACK * torch.minimum(size[a], size[b])
    common = high - low  # [p, 2], of both axes; 0 where two edges meet
    beside = (common > -slack).all(-1) & (common > slack).any(-1)
    return a[beside], b[beside]
