"""How scattered a map is over an image: the spatial entropy of localisation heads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CUT = 1e-3  # of attention above a map's mean: less is no part of a component
_SLACK = 0.01  # of a token's size: rounding keeps neighbours apart
_CHUNK = 1024  # tokens at a time, whose neighbours are looked for among all


def neighbours(rects: NDArray, times: NDArray) -> NDArray:
    """Which visual tokens touch, corners included.

    Args:
        rects: [C, 4] in fractions of the image or of the frame.
        times: [C, 2]; tokens of other times are of another picture.

    Returns:
        int [E, 2] of pairs i < j.
    """
    slack = _SLACK * (rects[:, 2:] - rects[:, :2])
    low, high = rects[:, :2] - slack, rects[:, 2:] + slack
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(rects), _CHUNK):
        part = slice(start, start + _CHUNK)
        near = (low[part, None] <= rects[None, :, 2:]) & (high[part, None] >= rects[None, :, :2])
        same = (times[part, None] == times[None]).all(-1)
        pairs = np.argwhere(near.all(-1) & same)
        pairs[:, 0] += start
        found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found)


def spatial_entropy(maps: NDArray, pairs: NDArray) -> NDArray:
    """-sum over components of p ln p, p a component's share of what a map has above its mean.

    Components are of neighbouring tokens whose attention is more than `CUT` above the mean.

    Args:
        maps: [M, C] attention, normalised over all visible keys.
        pairs: int [E, 2], of `neighbours`.

    Returns:
        [M]; infinite for a map without a component.

    Source: (K7); arXiv 2503.06287, as its code of June 2025 has it.
    """
    above = np.maximum(maps - maps.mean(-1, keepdims=True), 0.0)
    total = above.sum(-1)
    count, size = maps.shape
    on = above > CUT
    head, edge = np.nonzero(on[:, pairs[:, 0]] & on[:, pairs[:, 1]])
    nodes = (head * size + pairs[edge, column] for column in (0, 1))
    ones = np.ones(len(head), dtype=np.int8)
    graph = coo_array((ones, tuple(nodes)), shape=(count * size, count * size))
    _, label = connected_components(graph, directed=False)
    mass = np.bincount(label, weights=(above * on).ravel())
    owner = np.zeros(len(mass), dtype=np.int64)
    owner[label] = np.repeat(np.arange(count), size)
    share = mass / np.maximum(total[owner], 1e-30)
    part = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    found = np.bincount(owner, weights=part, minlength=count)
    return np.where(on.any(-1), found, np.inf)
