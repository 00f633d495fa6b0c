"""Which samples a step takes, with any number of processes: none twice and none left out.

An epoch is a permutation. Each of N processes takes a batch of it in turn, and what is missing of
the last round is filled up with samples that teach nothing, so that all processes take as many
steps, and N processes with batches of b learn what one process learns of batches of N x b.

A run that is continued by another number of processes takes another number of samples in a step.
It goes on at the sample at which it stopped: from there the epochs follow one another without a
gap, whatever the Trainer calls an epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, Sampler

from groundkern.hf.data.example import GroundedExample


class Filler(int):
    """The index of a sample that only fills a batch up."""


class FillerExample(GroundedExample):
    """A sample that only fills a batch up: nothing is learned from it, and it counts nowhere."""


@dataclass(frozen=True)
class Course:
    """How far through the data a step is.

    Args:
        samples: of the data.
        size: samples in a forward pass, of all processes together.
        accumulation: forward passes in a step.
        step, taken: where the run was continued: that step had taken so many samples since the
            start, those of earlier epochs among them.
    """

    samples: int
    size: int
    accumulation: int
    step: int = 0
    taken: int = 0

    @property
    def rounds(self) -> int:
        """Forward passes in an epoch."""
        return math.ceil(self.samples / self.size)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.rounds / self.accumulation)

    @property
    def moved(self) -> bool:
        """Whether these steps do not come to where the run was continued."""
        return self.taken != self._regular(self.step)

    def passes(self, step: int) -> int:
        """Forward passes before a step is over."""
        return step // self.steps * self.rounds + step % self.steps * self.accumulation

    def at(self, step: int) -> int:
        """The samples taken when so many steps are done."""
        if not self.moved:
            return self._regular(step)
        return self.taken + (self.passes(step) - self.passes(self.step)) * self.size

    def until(self, epochs: float) -> int:
        """The steps that so many epochs take."""
        if not self.moved:
            return math.ceil(epochs * self.steps)
        return bisect_left(range(10**12), self.end(epochs), lo=self.step, key=self.at)

    def end(self, epochs: float) -> int:
        """The samples that so many epochs take."""
        return max(1, round(epochs * self.samples))

    def _regular(self, step: int) -> int:
        epoch, within = divmod(step, self.steps)
        return epoch * self.samples + within * self.accumulation * self.size


class Order(Sampler):
    """The samples of an epoch in the order of another sampler, in whole rounds of all processes.

    Args:
        order: of one epoch after another (`set_epoch`), the same in all processes.
        course: of the run.
        last: samples after which only fillers come; None: never.
    """

    def __init__(self, order: Any, course: Course, last: int | None = None) -> None:
        self.order, self.course, self.last = order, course, last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch of the Trainer comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.course.rounds * self.course.size

    def __iter__(self) -> Iterator[int]:
        course = self.course
        if not course.moved:
            yield from self._filled(iter(self._samples(self.epoch)), len(self))
            return
        done = course.passes(course.step) - self.epoch * course.rounds  # of this epoch
        skipped = max(0, done) * course.size
        yield from (Filler(0) for _ in range(skipped))  # the Trainer passes over them
        at = course.taken + max(0, -done) * course.size
        yield from self._filled(self._from(at), len(self) - skipped)

    def _from(self, at: int) -> Iterator[int]:
        epoch, within = divmod(at, self.course.samples)
        while self.last is None or at < self.last:
            left = None if self.last is None else self.last - at
            found = self._samples(epoch)[within:][:left]
            yield from found
            epoch, within, at = epoch + 1, 0, at + len(found)

    def _filled(self, samples: Iterator[int], length: int) -> Iterator[int]:
        found = list(islice(samples, length))
        yield from found
        yield from (Filler(i % self.course.samples) for i in range(length - len(found)))

    def _samples(self, epoch: int) -> list[int]:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)
        return list(self.order)


class Filled(Dataset):
    """A data set that knows fillers.

    Args:
        data: of `GroundedExample`.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> GroundedExample:
        example = self.data[int(index) % len(self)]  # an epoch may be longer than the data
        return _silent(example) if isinstance(index, Filler) else example


def _silent(example: GroundedExample) -> FillerExample:
    fields = {**vars(example), "regions": (), "words": (), "phrases": ()}
    fields["messages"] = [
        {**each, "train": False} if each["role"] == "assistant" else each
        for each in example.messages
    ]
    return FillerExample(**fields)
