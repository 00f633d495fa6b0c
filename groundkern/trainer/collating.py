"""A collator that leaves out samples it cannot use, and reports what supervision a batch lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

from groundkern.hf import GroundedExample, GroundingCollator
from groundkern.hf.data.batch import without_rows
from groundkern.hf.data.geometry import Geometry
from groundkern.trainer.data.bad_samples import BadSample, BadSamples
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.data.order import FillerExample
from groundkern.trainer.streaming.stream import SampleStream

COUNTS = "counts"
FIRST = 64  # samples of a stream that are tried for a batch to use instead


class RobustCollator:
    """`GroundingCollator` for long runs: skips bad samples, and sends counts with each batch.

    A sample may pass every check of the data set and still not fit the model (its images alone
    exceed `max_length`, say). With "skip" the batch goes without it; if nothing is left, another
    batch is used instead, with nothing to learn. With "stop" it raises.

    A batch carries `COUNTS`: {"supervision": found and lost, "bad": samples left out of it, by this
    collator or by the data set}, so that the numbers are right with worker processes and
    prefetching. Of a stream it also has "read", the records that were read for it, and "reader",
    which one gave it and where that stands.

    Args:
        collator: does the work.
        on_bad_sample: "skip" or "stop".
        dataset: where the samples come from; its `bad` is used, and one of its samples where a
            process has no batch yet to use instead.

    Attributes:
        bad: the samples that this process left out.

    Raises:
        SampleError: a bad sample, with "stop" or when no batch is good; too many bad ones.
    """

    def __init__(
        self,
        collator: GroundingCollator,
        on_bad_sample: Literal["skip", "stop"],
        dataset: JsonLinesDataset | Mixture | SampleStream | None = None,
    ):
        self.collator, self.on_bad_sample, self.dataset = collator, on_bad_sample, dataset
        self.bad = BadSamples() if dataset is None else dataset.bad
        self._good: dict[str, Any] | None = None

    @property
    def geometry(self) -> Geometry:
        """Of the collator: where visual tokens are."""
        return self.collator.geometry

    def __call__(self, examples: list[GroundedExample]) -> dict[str, Any]:
        before, bad = Counter(self.collator.counts), []
        try:
            batch = self.collator(examples)
        except ValueError as error:
            if self.on_bad_sample == "stop":
                raise SampleError(str(error)) from error
            self.collator.counts = Counter(before)
            batch, bad = self._without_bad(examples, before)
        if self._good is None:
            self._good = batch
        after = self.collator.counts
        fillers = [x for x in examples if isinstance(x, FillerExample)]
        after = after - self._counted(fillers, after - before)
        found = {name: n - before[name] for name, n in after.items() if n != before[name]}
        bad += [late for late in self.bad.take() if late not in bad]
        told = {"supervision": found, "bad": bad}
        if isinstance(self.dataset, SampleStream):
            told |= {"read": self.dataset.take_read(), "reader": self.dataset.place}
        return {**batch, COUNTS: told}

    def _counted(self, fillers: list[GroundedExample], found: Counter) -> Counter:
        """What samples that only fill a batch up have been counted as.

        What was laid for them is their rows, as wide as the batch; of packed rows it is the share
        of their tokens.

        Args:
            fillers: of a batch.
            found: the counts of the batch.
        """
        if not fillers:
            return Counter()
        kept, self.collator.counts = self.collator.counts, Counter()
        try:
            for filler in fillers:
                with suppress(ValueError):  # a bad one has not been counted
                    self.collator([filler])
            own = self.collator.counts
            packed = self.collator.pack_to is not None
            for name, by in (
                ("tokens_padded", "samples"),
                ("tokens_laid", "tokens" if packed else "samples"),
            ):
                own[name] = found[name] * own[by] // max(found[by], 1)
            return own
        finally:
            self.collator.counts = kept

    def _without_bad(
        self, examples: list[GroundedExample], counts: Counter
    ) -> tuple[dict[str, Any], list[BadSample]]:
        good, bad = [], []
        for example in examples:
            if (found := self._problem(example)) is None:
                good.append(example)
            else:
                bad.append(found)
                self.bad.add(found)
        self.collator.counts = Counter(counts)
        if good:
            try:
                return self.collator(good), bad
            except ValueError as error:  # of samples that are good alone: no packing, say
                raise SampleError(str(error)) from error
        if self._good is None:
            self._good = self._another(bad[0])
            self.collator.counts = Counter(counts)
        return without_rows(self._good), bad

    def _another(self, bad: BadSample) -> dict[str, Any]:
        """A batch of any sample of the data set that has none of its problems."""
        for example in self._examples():
            if (found := self._problem(example)) is None:
                return self.collator([example])
            self.bad.add(found)
        raise SampleError(f"{bad.where}: {bad.reason}")

    def _examples(self) -> Iterator[GroundedExample]:
        if isinstance(self.dataset, SampleStream):
            loaded = map(self.dataset.load, self.dataset.first(FIRST))
            yield from (example for example in loaded if example is not None)
        elif self.dataset is not None:
            yield from (self.dataset[index] for index in range(len(self.dataset)))

    def _problem(self, example: GroundedExample) -> BadSample | None:
        """Why a sample cannot be used, None if it can."""
        try:
            self.collator([example])
        except ValueError as error:
            if example.name in str(error):
                return BadSample(example.name, str(error).replace(f"{example.name}: ", "", 1))
            if str(error).startswith("`"):  # a sentence for the user, which a worker would lose
                raise SampleError(str(error)) from error
            raise
        return None
