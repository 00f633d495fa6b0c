"""Several data files as one map-style data set: their samples, one file behind the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from groundkern.hf.data.example import GroundedExample
from groundkern.trainer.data.bad_samples import BadSamples
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.epochs import how_many
from groundkern.trainer.data.index import COUNTS
from groundkern.trainer.data.sample import Sample


class Mixture:
    """The samples of several `JsonLinesDataset`s; `groundkern.trainer.data.epochs` says what an
    epoch takes.

    Args:
        parts: the data sets.
        weights: times that an epoch takes the samples of each.

    Attributes:
        name: of all files, for messages.
        tasks, counts, digest, bad: as those of a `JsonLinesDataset`, of all files.
    """

    def __init__(self, parts: Sequence[JsonLinesDataset], weights: Sequence[float]) -> None:
        self.parts, self.weights = list(parts), list(weights)
        self.sizes = [len(part) for part in parts]
        self.name = ", ".join(part.name for part in parts)
        self.tasks = [task for part in parts for task in part.tasks]
        self.counts = {
            name: np.concatenate([part.counts[name] for part in parts]) for name in COUNTS
        }
        self.digest = hashlib.sha256("\n".join(part.digest for part in parts).encode()).hexdigest()
        self.bad = BadSamples.joined([part.bad for part in parts], parts[0].bad.max_fraction)
        for part in parts:
            part.bad = self.bad
        self._starts = np.cumsum([0, *self.sizes[:-1]])

    @property
    def in_epoch(self) -> int:
        """The samples that an epoch takes."""
        return sum(map(how_many, self.sizes, self.weights))

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> GroundedExample:
        part, inside = self._place(index)
        return part[inside]

    def sample(self, index: int) -> Sample:
        """The sample without its pixels; see `JsonLinesDataset.sample`."""
        part, inside = self._place(index)
        return part.sample(inside)

    def _place(self, index: int) -> tuple[JsonLinesDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])
