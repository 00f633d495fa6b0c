"""Figures of a task with their intervals, and paired differences between two evaluations.

A *scored* sample is a row of `predictions.jsonl`: its identity, its task, and for each metric the
sum and the count of its values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from groundkern.trainer.evaluation.rows import Row
from groundkern.trainer.metrics.intervals import interval, paired

ALL = "all samples"
Table = dict[str, dict[str, dict[str, Any]]]  # task: metric: what is known of it


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each task in the order in which the tasks appear; of several, all of them last
    (a task of that very name comes under it too)."""
    found: dict[str, list[Row]] = {}
    every = list(rows)
    for row in every:
        found.setdefault(row["task"], []).append(row)
    if len(found) > 1:
        found[ALL] = every
    return found


def measured(rows: Sequence[Row]) -> Table:
    """{task: {metric: value, low, high, samples}} of scored samples; a bound that one sample cannot
    tell is NaN."""
    return {
        task: {
            name: {**_interval(own, name), "samples": len(_with(own, name))} for name in _names(own)
        }
        for task, own in by_task(rows).items()
    }


def matched(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of the same sample: of the same line, and of equal lines the first with the first."""
    there = dict(zip(_identities(others), others))
    pairs = ((row, there.get(key)) for key, row in zip(_identities(rows), rows))
    return [(row, other) for row, other in pairs if other is not None]


def differences(pairs: Sequence[tuple[Row, Row]]) -> Table:
    """How much higher the first of each pair is than the second.

    Args:
        pairs: of `matched`.

    Returns:
        {task: {metric: of, other, value, low, high, p_value, samples}} of the metrics that both
        have: the two figures over the samples that have it on both sides, and first minus second.
    """
    table: Table = {}
    number = {id(row): i for i, (row, _) in enumerate(pairs)}
    for task, own in by_task(row for row, _ in pairs).items():
        both = [pairs[number[id(row)]] for row in own]
        names = [n for n in _names(own) if any(n in other["figures"] for _, other in both)]
        table[task] = {name: _difference(both, name) for name in names}
    return table


def _difference(pairs: Sequence[tuple[Row, Row]], name: str) -> dict[str, Any]:
    there = [
        (row["figures"][name], other["figures"][name])
        for row, other in pairs
        if name in row["figures"] and name in other["figures"]
    ]
    there = [(ours, theirs) for ours, theirs in there if ours[1] > 0 and theirs[1] > 0]
    if not there:
        return {"samples": 0}
    (right, m), (left, n) = (zip(*side) for side in zip(*there))
    gap = paired(left, right, n, m)
    return {
        "of": sum(right) / sum(m),
        "other": sum(left) / sum(n),
        **gap._asdict(),
        "samples": len(there),
    }


def _identities(rows: Iterable[Row]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        keys.append((row["hash"], seen[row["hash"]]))
        seen[row["hash"]] += 1
    return keys


def _names(rows: Iterable[Row]) -> list[str]:
    every = (name for row in rows for name, (_, count) in row["figures"].items() if count > 0)
    return list(dict.fromkeys(every))


def _with(rows: Sequence[Row], name: str) -> list[list[float]]:
    pairs = (row["figures"].get(name) for row in rows)
    return [pair for pair in pairs if pair is not None and pair[1] > 0]


def _interval(rows: Sequence[Row], name: str) -> dict[str, float]:
    sums, counts = zip(*_with(rows, name))
    return interval(sums, counts)._asdict()
