"""Which samples of several files an epoch takes, and in which order.

A file's weight says how many times an epoch takes its samples. Behind one another the epochs go
through one endless row of shuffles of the file, so that with a weight of 0.5 two epochs take every
sample once, and with 2.5 two epochs take each five times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def taken(size: int, weight: float, *, seed: Sequence[int], epoch: int) -> np.ndarray:
    """The samples of a file that an epoch takes: int64 [round(weight * size), at least 1].

    Args:
        size: samples of the file.
        weight: times that an epoch takes them.
        seed: of the file's shuffles.
        epoch: from 0.
    """
    count = how_many(size, weight)
    first, behind = epoch * count, (epoch + 1) * count
    shuffles = range(first // size, (behind - 1) // size + 1)
    row = [np.random.default_rng([*seed, number]).permutation(size) for number in shuffles]
    start = first - shuffles[0] * size
    return np.concatenate(row)[start : start + count]


def how_many(size: int, weight: float) -> int:
    """The samples of a file of `size` that an epoch takes."""
    return max(1, round(weight * size))


class EpochSampler(Sampler[int]):
    """The indices of an epoch over data sets that lie one behind the other.

    The same on every process and in every run: an epoch's order follows from the seed and
    from its number alone.

    Args:
        sizes: samples of each data set.
        weights: times that an epoch takes each.
        seed: of the order.
        lengths: of each sample, for batches of about the same length; None: any order.
        group: samples that should have about the same length: of one step, on all processes.

    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        lengths: np.ndarray | None = None,
        group: int = 1,
    ) -> None:
        self._epoch = 0
        self._sizes, self._weights, self._seed = list(sizes), list(weights), seed
        self._lengths, self._group = lengths, group

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(map(how_many, self._sizes, self._weights))

    def __iter__(self) -> Iterator[int]:
        starts = np.cumsum([0, *self._sizes[:-1]])
        parts = [
            start + taken(size, weight, seed=(self._seed, i), epoch=self._epoch)
            for i, (start, size, weight) in enumerate(zip(starts, self._sizes, self._weights))
        ]
        rng = np.random.default_rng([self._seed, len(self._sizes), self._epoch])
        chosen = rng.permutation(np.concatenate(parts))
        if self._lengths is not None:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            lengths = self._lengths[chosen].tolist()
            chosen = chosen[get_length_grouped_indices(lengths, self._group, generator=generator)]
        yield from chosen.tolist()
