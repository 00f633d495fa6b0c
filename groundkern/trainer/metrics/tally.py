"""Sums and counts of every metric, sample by sample, and their compact form in a run's files.

A mean alone does not tell how sure it is. What each sample adds to it does: `intervals` makes an
interval of one side and a paired test of two. A run's evaluation keeps, beside a task's means,

    "per_sample": {"of": digest, "sums": {metric: "0 1.25 ..."}, "counts": {metric: "1 3 ..."}}

with a number for each sample in the order of the file. `of` tells which samples these are: two
sides are paired only if theirs are the same. Records of older versions do not have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundkern.trainer.metrics.intervals import Difference, Interval, interval, paired

PER_SAMPLE = "per_sample"


class Sampled(NamedTuple):
    """A metric's values by sample: their sums [N], float, and how many there are [N], int."""

    sums: NDArray
    counts: NDArray


class Tally:
    """Sums and counts by metric and sample; undefined (NaN) values are left out.

    Args:
        samples: how many there are; 16 bytes of each are held for a metric.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._found: dict[str, Sampled] = {}
        self._labels: list[tuple[int, NDArray, NDArray]] = []  # (batch, sample, label) of tokens
        self._rows = np.arange(samples)
        self._batch = 0
        self._names: list[tuple[int, bytes]] = []  # (batch, what was loaded for it)

    def begin(self, rows: Sequence[int], names: Iterable[str], batch: int | None = None) -> None:
        """Says which samples the rows of the next batch are, and what was loaded for it.

        Args:
            rows, names: of the batch.
            batch: its number among those of all processes; None: the next one.
        """
        self._rows = np.asarray(rows, dtype=np.int64)
        self._batch = self._batch + 1 if batch is None else batch
        text = "".join(f"{name}\n" for name in names)
        self._names.append((self._batch, text.encode("utf-8", "replace")))

    def add(self, name: str, values: Tensor, rows: Tensor) -> None:
        """Adds values [N] of any real or bool dtype, each of a row [N] of the batch."""
        if name not in self._found:
            self._found[name] = Sampled(np.zeros(self._samples), np.zeros(self._samples, np.int64))
        values = values.double()
        there = ~values.isnan()
        at, found = self._rows[rows[there].cpu().numpy()], self._found[name]
        np.add.at(found.sums, at, values[there].cpu().numpy())
        np.add.at(found.counts, at, 1)

    def add_words(self, predicted: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Adds what was predicted [N] of rows [N] of the batch, and the labels [N, L] that each may
        have, below 0 where there is none."""
        self.add("word_accuracy", (predicted[:, None] == labels).any(1), rows)
        there = labels >= 0
        at = self._rows[rows[:, None].expand_as(labels)[there].cpu().numpy()]
        found = labels[there].cpu().numpy().astype(np.int32)
        self._labels.append((self._batch, at.astype(np.int32), found))

    @classmethod
    def joined(cls, parts: Sequence[Tally]) -> Tally:
        """One tally of those of several processes, as if one had seen every batch in order.

        Args:
            parts: of the same samples, no batch in two of them.
        """
        first, *others = parts
        for part in others:
            for name, one in part._found.items():
                own = first._found.setdefault(
                    name, Sampled(np.zeros(first._samples), np.zeros(first._samples, np.int64))
                )
                np.add(own.sums, one.sums, out=own.sums)
                np.add(own.counts, one.counts, out=own.counts)
            first._labels += part._labels
            first._names += part._names
        first._labels.sort(key=lambda found: found[0])
        first._names.sort(key=lambda found: found[0])
        return first

    def by_sample(self) -> dict[str, Sampled]:
        """Sums and counts of every metric that has a value, `word_baseline` among them."""
        found = {name: one for name, one in self._found.items() if one.counts.any()}
        if self._labels and "word_accuracy" in found:
            _, *parts = zip(*self._labels)
            at, labels = map(np.concatenate, parts)
            seen, first, count = np.unique(labels, return_index=True, return_counts=True)
            most = count == count.max()
            frequent = seen[most][first[most].argmin()]
            hits = np.bincount(at[labels == frequent], minlength=self._samples)
            found["word_baseline"] = Sampled(hits.astype(float), found["word_accuracy"].counts)
        return found

    def figures(self, data: str = "") -> dict[str, Any]:
        """{"samples": count, metric: mean, "per_sample": the compact form of what made it}.

        Args:
            data: what the samples' names belong to: the digest of their file.
        """
        found = self.by_sample()
        names = b"".join(text for _, text in self._names) + data.encode()
        return {
            "samples": self._samples,
            **{name: float(one.sums.sum() / one.counts.sum()) for name, one in found.items()},
            PER_SAMPLE: {
                "of": hashlib.sha256(names).hexdigest()[:16],
                "sums": {name: _packed(one.sums) for name, one in found.items()},
                "counts": {name: _packed(one.counts) for name, one in found.items()},
            },
        }


def sampled(figures: dict[str, Any], metric: str) -> Sampled | None:
    """A metric's sums and counts from a task's figures; None of a record that has none."""
    kept = figures.get(PER_SAMPLE) or {}
    if metric not in kept.get("sums", ()):
        return None
    sums, counts = (_unpacked(kept[part][metric]) for part in ("sums", "counts"))
    return Sampled(sums, counts.astype(np.int64))


def interval_of(figures: dict[str, Any], metric: str) -> Interval | None:
    """A metric's mean and 95 % interval from a task's figures; None of a record without them."""
    found = sampled(figures, metric)
    return None if found is None else interval(*found)


def paired_of(
    left: dict[str, Any], right: dict[str, Any], metric: str, *, than: str = "", scale: float = 1.0
) -> tuple[Difference, int] | None:
    """Right's metric minus left's on the same samples, and how many these are.

    Args:
        left, right: a task's figures of two runs.
        metric: the metric of both.
        than: another metric of the left side.
        scale: what the left side is multiplied by: 2 asks by how much right is above twice left.

    Returns:
        None if the samples are not the same, or a side's record does not have them.
    """
    one, two = sampled(left, than or metric), sampled(right, metric)
    if one is None or two is None or left[PER_SAMPLE]["of"] != right[PER_SAMPLE]["of"]:
        return None
    found = paired(scale * one.sums, two.sums, one.counts, two.counts)
    return found, int(((one.counts > 0) & (two.counts > 0)).sum())


def _packed(values: NDArray) -> str:
    if values.dtype.kind == "i":
        return " ".join(map(str, values.tolist()))
    return " ".join(f"{x:.6g}" for x in values.tolist())


def _unpacked(text: str) -> NDArray:
    return np.array(text.split(), dtype=float)


def row_of(mask: Tensor) -> Tensor:
    """The row of each true element of a mask [B, R]: int64 [N], in the order of `x[mask]`."""
    return torch.nonzero(mask)[:, 0]
