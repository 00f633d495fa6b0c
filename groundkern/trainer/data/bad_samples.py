"""The samples that a run goes without: each once, told once, and up to a share of all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from groundkern.trainer.data.images import SampleError

logger = logging.getLogger(__name__)

SHOWN = 20  # bad samples that are logged one by one


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: `file:line`, and why."""

    where: str
    reason: str


class BadSamples(list[BadSample]):
    """`BadSample`s in the order in which they were found, none twice.

    A worker process of a DataLoader has its own, says nothing, and sends what it found with its
    batches (`take`); the main process adds that to its own and tells the user.

    Args:
        max_fraction: of all samples that may be bad.
        least: samples that `total` must count before any share of them is too much.

    Attributes:
        total: samples of the file, good and bad; 0 until that is known, and nothing is too many. Of
            a stream, those that were read so far.
    """

    def __init__(self, max_fraction: float = 1.0, *, least: int = 0) -> None:
        super().__init__()
        self.max_fraction, self.least, self.total = max_fraction, least, 0
        self._known: set[str] = set()
        self._news: list[BadSample] = []

    @classmethod
    def joined(cls, parts: Iterable[BadSamples], max_fraction: float) -> BadSamples:
        """Those of several files, whose totals are known, as one; they were told before."""
        joint = cls(max_fraction)
        for part in parts:
            joint.extend(part)
            joint.total += part.total
        joint._known = {bad.where for bad in joint}
        return joint

    def add(self, bad: BadSample) -> None:
        """Add one that is not known yet.

        Raises:
            SampleError: these are too many.
        """
        if bad.where in self._known:
            return
        self._known.add(bad.where)
        self.append(bad)
        self._news.append(bad)
        if len(self) <= SHOWN and not _in_loader_process():
            logger.warning("bad sample skipped: %s: %s", bad.where, bad.reason)
        self.check()

    def report(self, error: SampleError, on_bad_sample: str) -> None:
        """Add the sample that an error names, `where: reason`.

        Raises:
            SampleError: this one, with "stop"; these are too many.
        """
        if on_bad_sample == "stop":
            raise error
        where, _, reason = str(error).partition(": ")
        self.add(BadSample(where, reason))

    def add_all(self, found: Iterable[BadSample]) -> None:
        """Add several."""
        for bad in found:
            self.add(bad)

    def take(self) -> list[BadSample]:
        """Those added since this was called last."""
        news, self._news = self._news, []
        return news

    def check(self, total: int | None = None) -> None:
        """Raise `SampleError` if there are more than `max_fraction` allows.

        Args:
            total: in the place of `self.total`.
        """
        total = self.total if total is None else total
        if total > self.least and len(self) > self.max_fraction * total:
            first = self[0]
            raise SampleError(
                f"{first.where.partition(':')[0]}: expected at most {self.max_fraction:g} of the "
                f"samples to be bad (`data.max_bad_fraction`), got {len(self):,} of "
                f"{total:,}; the first: {first.where}: {first.reason}"
            )


def _in_loader_process() -> bool:
    """Whether this is a worker of a DataLoader; where torch is not imported it is none."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None
