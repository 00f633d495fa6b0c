"""The metrics of an answer that a sample gets, and what people read about each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.evaluation.rows import Row
from groundkern.trainer.metrics.golds import (
    Gold,
    Units,
    gold_places,
    predicted_boxes,
    predicted_points,
)
from groundkern.trainer.metrics.places import Box, Point
from groundkern.trainer.metrics.registry import METRICS, gold_of, task_metrics

LOOKING = {
    "answer_loss": ("answer loss", False),
    "token_accuracy": ("answer tokens right", True),
    "answer_accuracy": ("answers right, teacher forced", True),
    "number_accuracy": ("digits right", True),
    "attention_ratio": ("attention ratio", True),
    "attention_mass": ("attention mass", True),
    "attention_argmax": ("attention peak in region", True),
    "peak_in_mask": ("contribution peak in region", True),
    "roc_auc": ("contribution AUC", True),
    "gradcam_peak": ("GradCAM peak in region", True),
}
"""Teacher-forced figures: {name: (title, whether higher is better)}."""
_NONE: Mapping[int, Row] = MappingProxyType({})
_PLACES = ("boxes", "places")  # what special tokens may stand for


class Marks(NamedTuple):
    """Places of an image in its fractions: boxes, points, polygons; masks of all of it."""

    boxes: Sequence[Box] = ()
    points: Sequence[Point] = ()
    polygons: Sequence[Sequence[Point]] = ()
    masks: Sequence[NDArray[np.bool_]] = ()


class Marked(NamedTuple):
    """What is right of a sample's first image, and where the answer points to."""

    right: Marks
    answered: Marks


class About(NamedTuple):
    """What people read about a metric."""

    title: str
    higher_is_better: bool
    teacher_forced: bool
    source: str


def about(name: str) -> About:
    """What people read about a metric of answers, or a teacher-forced figure."""
    if name in LOOKING:
        title, higher = LOOKING[name]
        return About(title, higher, True, "")
    metric = METRICS[name]
    return About(metric.title, metric.higher_is_better, False, metric.source)


def check_names(names: Sequence[str] | None) -> None:
    """Refuse what is no metric.

    Raises:
        ConfigError: a name that is not in METRICS.
    """
    for name in names or ():
        if name not in METRICS:
            raise ConfigError(f"--metrics: expected some of {', '.join(METRICS)}, got {name}")


class Scoring:
    """Scores answers by the metrics asked for, or by those of each sample's task.

    Args:
        names: of METRICS; None: of each sample's task.
        coord: what the numbers of boxes in answers count whose notation does not say so; None: as
            those of the gold.
    """

    def __init__(self, names: Sequence[str] | None, coord: Units | None) -> None:
        self._names = tuple(dict.fromkeys(names)) if names else None
        self._coord = coord
        self._golds: dict[int, Gold] = {}
        self._by_task: dict[str, tuple[str, ...]] = {}

    def prepare(
        self, samples: Sequence[tuple[int, Sample]], answers: Mapping[int, Row] = _NONE
    ) -> None:
        """Takes note of all samples, whose tasks decide by which metrics each is measured.

        Args:
            samples: (index, sample) of each that was answered.
            answers: their rows, which say what size of image the model saw.

        Raises:
            ConfigError: boxes shall count pixels of the resized image, whose size is not known.
        """
        tasks: dict[str, list[Gold]] = {}
        for index, sample in samples:
            resized = answers.get(index, {}).get("resized")
            if self._coord == "resized" and sample.images and resized is None:
                raise ConfigError(
                    "--coord: expected answers of a model whose processor stretches whole images "
                    f"and says to which size (Qwen's), for resized, got none for {sample.where}"
                )
            size = None if resized is None else tuple(resized)
            gold = self._golds[index] = gold_of(sample, coord=self._coord, resized=size)
            tasks.setdefault(sample.task, []).append(gold)
        for task, golds in tasks.items():
            self._by_task[task] = self._names or task_metrics(golds)

    def score(self, row: Row) -> dict[str, list[float]]:
        """{metric: [sum, count]} of the answer of a prepared sample, by the metrics that fit it.

        Boxes and points are read in the text with its special tokens, of which some notations are
        made; everything else in the text without.
        """
        gold = self._golds[row["sample"]]
        plain = _plain(gold, row["gold"])
        found = {}
        for name in self._by_task[gold.task]:
            metric = METRICS[name]
            if not metric.fits(gold):
                continue
            if metric.needs in _PLACES:
                score = metric.score(row.get("raw", row["prediction"]), gold)
            else:
                score = metric.score(row["prediction"], plain)
            found[name] = [float(score.sum), float(score.count)]
        return found

    def marks(self, row: Row) -> Marked:
        """The places of a prepared sample; of its answer those that a metric has read."""
        gold = self._golds[row["sample"]]
        right, answered = gold_places(gold), Marks()
        if any(METRICS[name].needs in _PLACES for name in self._by_task[gold.task]):
            text = row.get("raw", row["prediction"])
            found = predicted_boxes(text, gold)
            answered = Marks(found, () if found else predicted_points(text, gold))
        return Marked(Marks(right.boxes, right.points, right.polygons, right.masks), answered)

    def badness(self, row: Row) -> float | None:
        """How bad an answer is by the first metric it has; None if it is perfect or has none."""
        for name in self._by_task[row["task"]]:
            total, count = row["figures"].get(name, (0, 0))
            if count > 0:
                bad = 1 - total / count if METRICS[name].higher_is_better else total / count
                return bad if bad > 0 else None
        return None


def _plain(gold: Gold, texts: Sequence[str]) -> Gold:
    """A gold whose answers are these texts, which are its own without special tokens."""
    by_answer = dict(zip(gold.answers, texts))
    votes = tuple(by_answer.get(vote, vote) for vote in gold.votes)
    return replace(gold, answers=tuple(dict.fromkeys(texts)), votes=votes)
