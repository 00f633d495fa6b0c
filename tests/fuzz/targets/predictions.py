"""What an evaluation leaves behind and reads back: rows of samples, its own and another one's."""

from __future__ import annotations

import json

from groundkern.trainer.evaluation import figures
from groundkern.trainer.evaluation.rows import identity, is_answer, is_prediction, newest, read_rows
from tests.fuzz.scratch import written
from tests.fuzz.target import Target, expect

LINES = [identity(n) for n in range(3)]


def check_answers(data: bytes) -> bool:
    """Rows of a part: those that are whole, each of a sample that is there."""
    rows = read_rows(written("evaluation/answers-0.jsonl", data), is_answer)
    expect(len(rows) <= data.count(b"\n"), "a row a line at most", len(rows))
    found = newest(iter(rows), LINES)
    expect(all(LINES[i] == row["hash"] for i, row in found.items()), "their samples", found)
    return bool(found)


def check_predictions(data: bytes) -> bool:
    """Rows of another evaluation: all that is read can be compared."""
    rows = read_rows(written("evaluation/predictions.jsonl", data), is_prediction)
    pairs = figures.matched(rows, rows)
    expect(len(pairs) == len(rows), "every sample with itself", len(pairs), len(rows))
    if len(rows) <= 3:  # more are not mutated but repeated, and intervals take time
        for metrics in figures.differences(pairs).values():
            gaps = [gap["value"] for gap in metrics.values() if gap["samples"]]
            expect(all(gap == 0 for gap in gaps), "no difference from itself", gaps)
        figures.measured(rows)
    return bool(rows)


def _lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


_SAID = {"prediction": "4", "gold": ["4", "four"], "tokens": 2, "ended": True}
ANSWERS = [{"sample": i, "hash": LINES[i], **_SAID} for i in range(3)]
ANSWERS[2] = {"sample": 2, "hash": LINES[2], "error": "test.jsonl:3: broken"}
SCORED = [
    {**ANSWERS[i], "task": "t", "question": "?", "figures": {"anls": [i, 1], "cer": [1.5, 3]}}
    for i in range(2)
]
TARGETS = (
    Target(
        "answers",
        check_answers,
        {"three": _lines(*ANSWERS), "cut": _lines(*ANSWERS)[:-9]},
        "jsonl",
        ("sample", "hash", "error", "raw"),
    ),
    Target(
        "predictions",
        check_predictions,
        {"two": _lines(*SCORED), "one": _lines(SCORED[1])},
        "jsonl",
        ("figures", "task", "[0, 0]"),
        0.5,
    ),
)
