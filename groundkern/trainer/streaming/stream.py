"""Samples that are read as they come: by `datasets`, shared by ranks and workers, without an end.

A reader is one worker process of one rank (or the rank itself, without workers). Each has its share
of the pieces that the files are cut into, and goes through it epoch after epoch, so that none ends
before another. What it gives follows from the seed, from its number and from how many readers there
are, and nothing else; so where it stands is three numbers (`Place`). A run that continues reads the
raw records up to there again, in the same order through the same shuffle buffer, but parses none of
them and decodes no image. (`datasets` can go on from a state of its own, but with an empty shuffle
buffer: other samples than those of a run that was not interrupted.)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from groundkern.hf.data.example import GroundedExample
from groundkern.trainer.data.bad_samples import BadSamples
from groundkern.trainer.data.images import DataChanged, SampleError
from groundkern.trainer.data.lengths import LengthEstimate
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.streaming.records import RecordReader
from groundkern.trainer.streaming.shards import Shards, read_shards

logger = logging.getLogger(__name__)

ROWS = 64  # records that are taken of `datasets` at a time
LEAST = 200  # records that were read before a share of bad ones is too much
GROUPED = 50  # batches whose samples are sorted by length together, as transformers does

Raw = tuple[int, str, bytes]  # source, what messages call it, content


class Place(NamedTuple):
    """Where a reader stands.

    Args:
        epoch: from 0.
        records: raw ones of the epoch that come before the pool that its last sample was in.
        given: samples of that pool up to and with the last one.
    """

    epoch: int = 0
    records: int = 0
    given: int = 0


@dataclass(frozen=True)
class Source:
    """One of the paths of `data.train`.

    Args:
        shards: its files.
        labels: what messages call these.
        reader: of their records.
        weight: times that its samples are to be taken, beside the other sources.
    """

    shards: Shards
    labels: list[str]
    reader: RecordReader
    weight: float = 1.0


class SampleStream(TorchIterableDataset):
    """The usable samples of files without an index: `GroundedExample`s, without an end.

    Each record is checked as it comes. A bad one is left out and added to `bad`, or raises with
    "stop".

    Args:
        sources: where samples come from.
        seed: of their order.
        buffer: records among which the next one is picked.
        on_bad_sample: "skip" or "stop".
        max_bad_fraction: of the records that were read that may be bad, once these are `LEAST`.

    Attributes:
        name: of all sources, for messages.
        digest: of the files' names, sizes and ends.
        bad: the records left out, of this process.
        rank, ranks, workers: which readers there are, and whose this process has.
        place: where the reader of this process stands, with its number; None: it gave nothing yet.

    Raises:
        SampleError: a bad record, with "stop"; too many of them; a reader without any.
        DataChanged: a file that can no longer be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        buffer: int,
        on_bad_sample: Literal["skip", "stop"] = "skip",
        max_bad_fraction: float = 1.0,
    ) -> None:
        self.sources, self.seed, self.buffer = list(sources), seed, buffer
        self.on_bad_sample = on_bad_sample
        self.name = ", ".join(dict.fromkeys(label for s in sources for label in s.labels[:2]))
        digests = "\n".join(source.shards.digest() for source in sources)
        self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self.bad = BadSamples(max_bad_fraction, least=LEAST)
        self.rank, self.ranks, self.workers = 0, 1, 0
        self.place: tuple[int, Place] | None = None
        self.starts: dict[int, Place] = {}
        self.turn = 0  # the worker whose batch comes first
        self._pool, self._batch, self._lengths = 1, 1, None
        self._read = self._unsaid = 0

    @property
    def shares(self) -> list[float]:
        """The share of each source among the samples, by its weight and about how many it has."""
        sizes = [source.weight * source.shards.estimate() for source in self.sources]
        return [size / sum(sizes) for size in sizes]

    def group_by_length(self, lengths: LengthEstimate, batch: int) -> None:
        """Give batches of samples of about the same length, of those in the shuffle buffer.

        Args:
            lengths: of samples.
            batch: samples in a batch.
        """
        batches = max(1, min(GROUPED, self.buffer // batch))
        self._pool, self._batch, self._lengths = batches * batch, batch, lengths

    def take_read(self) -> int:
        """How many records this process has read since this was called last."""
        news, self._unsaid = self._unsaid, 0
        return news

    def first(self, count: int) -> list[Sample]:
        """The first usable samples, without their pixels; at most as many records are passed over
        as `LEAST`."""
        found: list[Sample] = []
        read = self._read, self._unsaid
        for passed, (_, _, raw) in enumerate(self._records(0, 1, Place())):
            if (sample := self._sample(raw)) is not None:
                found.append(sample)
            if len(found) == count or passed >= count + LEAST:
                break
        self._read, self._unsaid = read
        return found

    def load(self, sample: Sample) -> GroundedExample | None:
        """A sample with its pixels; None if they cannot be decoded, which is reported."""
        try:
            return sample.load()
        except SampleError as error:
            self._report(error)
            return None
        finally:
            for source in self.sources:
                source.reader.forget(sample)

    def __iter__(self) -> Iterator[GroundedExample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        number = self.rank * workers + (worker + self.turn) % workers
        place = self.starts.get(number, Place())
        records = self._records(number, self.ranks * workers, place)
        given = place.given
        while True:
            (epoch, before), pool = self._next_pool(records)
            for i in range(given, len(pool)):
                if (example := self.load(pool[i])) is not None:
                    self.place = number, Place(epoch, before, i + 1)
                    yield example
            given = 0

    def _next_pool(
        self, records: Iterator[tuple[int, int, Raw]]
    ) -> tuple[tuple[int, int], list[Sample]]:
        """(epoch, records of it before) and the samples of the next records, in their order."""
        begin = None
        pool: list[Sample] = []
        while len(pool) < self._pool:
            epoch, before, raw = next(records)
            begin = begin or (epoch, before)
            if not pool and epoch > begin[0] + 1:  # a whole epoch without one
                raise SampleError(f"{self.name}: expected a usable sample, got none")
            if (sample := self._sample(raw)) is not None:
                pool.append(sample)
        return begin, pool if self._lengths is None else self._grouped(pool, begin)

    def _grouped(self, pool: list[Sample], begin: tuple[int, int]) -> list[Sample]:
        """The samples of a pool in batches of about the same length, the batches in any order."""
        order = np.argsort([self._lengths.of(sample) for sample in pool], kind="stable")
        batches = order.reshape(-1, self._batch)
        rng = np.random.default_rng([self.seed, *begin])
        return [pool[i] for i in rng.permutation(batches).reshape(-1)]

    def _sample(self, raw: Raw) -> Sample | None:
        """The sample of a record; None for a bad one, which is reported."""
        source, where, content = raw
        self._read += 1
        self._unsaid += 1
        try:
            return self.sources[source].reader.sample(where, content)
        except DataChanged:
            raise
        except SampleError as error:
            self._report(error)
            return None

    def _report(self, error: SampleError) -> None:
        self.bad.report(error, self.on_bad_sample)
        self.bad.check(self._read)

    def _records(self, number: int, readers: int, start: Place) -> Iterator[tuple[int, int, Raw]]:
        """(epoch, records of it before, record) of one of the readers, from a place on."""
        epoch, skipped = start.epoch, start.records
        while True:
            there = False
            for before, raw in enumerate(self._epoch(number, readers, epoch)):
                there = True
                if before >= skipped:
                    yield epoch, before, raw
            if not there:
                raise SampleError(
                    f"{self.name}: expected records for each of {readers} readers (processes and "
                    f"their workers), got none for one of them; use fewer `training.workers`"
                )
            epoch, skipped = epoch + 1, 0

    def _epoch(self, number: int, readers: int, epoch: int) -> Iterator[Raw]:
        """The raw records of an epoch for one of the readers."""
        from datasets import IterableDataset, interleave_datasets  # takes a second
        from datasets.distributed import split_dataset_by_node

        data = [
            IterableDataset.from_generator(
                read_shards,
                gen_kwargs={"shards": source.shards.cut(source.labels, readers), "source": i},
            )
            for i, source in enumerate(self.sources)
        ]
        mixed = data[0]
        if len(data) > 1:
            mixed = interleave_datasets(
                data, probabilities=self.shares, seed=self.seed, stopping_strategy="all_exhausted"
            )
        mixed = mixed.shuffle(seed=self.seed, buffer_size=self.buffer)
        mixed = split_dataset_by_node(mixed, number, readers)
        mixed.set_epoch(epoch)
        # not `iter(mixed)`, which would divide the share once more in a worker process
        rows = mixed.iter(ROWS)
        return chain.from_iterable(_raw(batch) for batch in rows)


def _raw(batch: dict[str, list[Any]]) -> Iterable[Raw]:
    return zip(batch["source"], batch["where"], batch["content"], strict=True)
