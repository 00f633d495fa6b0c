"""Precision and recall of phrases, subjects and composites against hand-labelled samples.

`python -m benchmarks.preparing.phrases FILE` prints them by `task` of the samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundkern.trainer.data.sample import Sample, parse_sample
from groundkern.trainer.prepare.phrases.command import Finder, add_finder, chosen
from groundkern.trainer.prepare.sources import json_lines

KINDS = ("phrases", "subjects", "composites")
Span = tuple[int, ...]


@dataclass
class Score:
    """Spans found, in truth, and in both, by kind; `wrong` lists the differences."""

    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    true: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    wrong: list[str] = field(default_factory=list)

    def precision(self, kind: str) -> float:
        return self.right[kind] / max(1, self.found[kind])

    def recall(self, kind: str) -> float:
        return self.right[kind] / max(1, self.true[kind])


def evaluate(path: Path, records: Callable[[str, int], list[dict]]) -> dict[str, Score]:
    """Scores by `task` of the samples.

    A phrase is right if its characters are; a subject if its own and its phrase's are.

    Args:
        path: canonical samples with true `phrases`, one without a subject being a composite.
        records: an answer and its turn to canonical phrases.

    Raises:
        SampleError: a line is no canonical sample.
    """
    from groundkern.trainer.data.images import SampleError

    scores: dict[str, Score] = {}
    for item in json_lines(path).read():
        if item.problem:
            raise SampleError(item.problem)
        truth = parse_sample(item.value, root=path.parent, where=item.where)
        score = scores.setdefault(truth.task, Score())
        for turn, message in enumerate(item.value["messages"]):
            if message["role"] != "assistant":
                continue
            text = _answer(message)
            found = {**item.value, "phrases": records(text, turn)}
            guess = parse_sample(found, root=path.parent, where=item.where)
            _compare(score, _spans(truth, turn), _spans(guess, turn), text, item.where)
    return scores


def report(scores: dict[str, Score]) -> list[str]:
    """One line for each task and kind."""
    lines = []
    for task, score in scores.items():
        for kind in KINDS:
            lines.append(
                f"{task or 'all':>8} {kind:<11} precision {score.precision(kind):6.1%}  "
                f"recall {score.recall(kind):6.1%}  ({score.right[kind]} of {score.found[kind]} "
                f"found and {score.true[kind]} true)"
            )
    return lines


def _answer(message: dict[str, Any]) -> str:
    from groundkern.hf.data.example import message_text

    return message_text(message)


def _spans(sample: Sample, turn: int) -> dict[str, set[Span]]:
    phrases = [phrase for phrase in sample.phrases if phrase.turn == turn]
    simple = [phrase for phrase in phrases if phrase.subject is not None]
    return {
        "phrases": {(p.start, p.stop) for p in simple},
        "subjects": {(p.start, p.stop, *p.subject) for p in simple},
        "composites": {(p.start, p.stop) for p in phrases if p.subject is None},
    }


def _compare(score: Score, true: dict, found: dict, text: str, where: str) -> None:
    for kind in KINDS:
        score.true[kind] += len(true[kind])
        score.found[kind] += len(found[kind])
        score.right[kind] += len(true[kind] & found[kind])
        for title, spans in (
            ("missing", true[kind] - found[kind]),
            ("false", found[kind] - true[kind]),
        ):
            for span in sorted(spans):
                score.wrong.append(f"{where}: {title} {kind[:-1]} {text[span[0] : span[1]]!r}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing.phrases")
    parser.description = "Precision and recall of phrases by rules or spaCy."
    parser.add_argument("file", type=Path, help="samples (JSON lines) with true phrases")
    parser.add_argument("--wrong", action="store_true", help="print every difference too")
    add_finder(parser)
    arguments = parser.parse_args(words)
    if arguments.by == "model":
        parser.error("--by model: expected auto, rules or spacy")
    by = chosen(arguments.by, arguments.spacy_model)
    scores = evaluate(arguments.file, Finder(by, arguments.spacy_model))
    print("\n".join([f"Phrases by {by}", *report(scores)]))
    for score in scores.values() if arguments.wrong else ():
        print("\n".join(score.wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
