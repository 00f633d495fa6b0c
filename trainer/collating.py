"""A collator that leaves out samples it cannot use, and reports what supervision a batch lost."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Literal

from groundkern.hf import GroundedExample, GroundingCollator
from groundkern.hf.data.batch import without_rows
from trainer.dataset import BadSample
from trainer.images import SampleError

COUNTS = "counts"

logger = logging.getLogger(__name__)


class RobustCollator:
    """`GroundingCollator` for long runs: skips bad samples, and sends counts with each batch.

    A sample may pass every check of the data set and still not fit the model (its images alone
    exceed `max_length`, say). With "skip" the batch goes without it; if nothing is left, an earlier
    batch is used instead, with nothing to learn. With "stop" it raises.

    A batch carries `COUNTS`: {"supervision": found and lost, "bad": samples left out}, so that the
    numbers are right with worker processes and prefetching.

    Args:
        collator: does the work.
        on_bad_sample: "skip" or "stop".

    Attributes:
        bad: the samples that this process left out.

    Raises:
        SampleError: a bad sample, with "stop" or when no batch was good before.
    """

    def __init__(self, collator: GroundingCollator, on_bad_sample: Literal["skip", "stop"]):
        self.collator, self.on_bad_sample = collator, on_bad_sample
        self.bad: list[BadSample] = []
        self._good: dict[str, Any] | None = None

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
        found = {name: n - before[name] for name, n in after.items() if n != before[name]}
        return {**batch, COUNTS: {"supervision": found, "bad": bad}}

    def _without_bad(self, examples: list[GroundedExample], counts: Counter) -> tuple[dict, list]:
        good, bad = [], []
        for example in examples:
            try:
                self.collator([example])
                good.append(example)
            except ValueError as error:
                if example.name not in str(error):
                    raise
                bad.append(BadSample(example.name, str(error)))
                if bad[-1] not in self.bad:
                    self.bad.append(bad[-1])
                    logger.warning("bad sample skipped: %s", error)
        self.collator.counts = Counter(counts)
        if good:
            return self.collator(good), bad
        if self._good is None:
            raise SampleError(bad[0].reason)
        return without_rows(self._good), bad
