"""Every metric of an answer by name, what it needs of a sample, and which ones a sample gets.

`METRICS[name].score(predicted, gold)` is a `Score`, a sum and a count: the figure of a data set is
the sum of the sums over that of the counts. For most metrics a sample counts once; for error rates
it counts as many characters or words as it has, for coordinates as many as there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from groundkern.hf.data.example import is_trained, message_text
from groundkern.trainer.data.images import wrong
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.metrics import answers, boxes, reading, tables, vqa
from groundkern.trainer.metrics.golds import (
    Gold,
    Units,
    boxes_in,
    coord_of,
    gold_boxes,
    gold_places,
    points_in,
    predicted_boxes,
    predicted_points,
)
from groundkern.trainer.metrics.numbers import number
from groundkern.trainer.metrics.places import Size


class Score(NamedTuple):
    """What a sample adds to a figure: the sum of its values, and how many values that are."""

    sum: float
    count: float


Needs = Literal["answer", "votes", "number", "table", "boxes", "places"]


@dataclass(frozen=True)
class Metric:
    """A metric of one answer.

    Args:
        name: as in `METRICS`.
        title: what a report calls it.
        higher_is_better: False for error rates.
        source: the paper or program that it comes from.
        needs: what the gold has to have: "answer", any text; "votes", answers of four people or
            more; "number", whole numbers in it; "table", a table of two rows and columns; "boxes",
            boxes in the text or the regions; "places", regions, or points or boxes in the text.
        score: predicted text and gold to a `Score`; never raises, whatever the text.
    """

    name: str
    title: str
    higher_is_better: bool
    source: str
    needs: Needs
    score: Callable[[str, Gold], Score]

    def fits(self, gold: Gold) -> bool:
        """Whether the gold has what the metric needs; without it scores mean nothing."""
        return _HAS[self.needs](gold)


def gold_of(
    sample: Sample,
    *,
    turn: int | None = None,
    coord: Units | None = None,
    resized: Size | None = None,
) -> Gold:
    """What the metrics may know of one of a sample's answers.

    Args:
        sample: checked.
        turn: the index of an assistant message; None: the last that is trained.
        coord: of boxes and points in predictions; None: as in the gold answer. That has those in
            which its boxes are its regions; where nothing tells, `coord`, but thousandths for
            "resized", since data is seldom in the pixels of one processor.
        resized: (width, height) of what the processor makes of the first image; None: unknown.

    Raises:
        SampleError: the sample's `metrics` has a name that is not in `METRICS`.
    """
    for i, name in enumerate(sample.metrics):
        if name not in METRICS:
            raise wrong(sample.where, f"metrics[{i}]", f"one of {', '.join(METRICS)}", repr(name))
    said = [i for i, message in enumerate(sample.messages) if is_trained(message)]
    turn = said[-1] if turn is None else turn
    others = sample.answers if turn == said[-1] else ()
    texts = (message_text(sample.messages[turn]), *others)
    of_image = (i for i, r in enumerate(sample.regions) if r.video is None and r.image == 0)
    here = [i for i in of_image if sample.regions[i].turn == turn]
    gold = Gold(
        answers=tuple(dict.fromkeys(texts)),
        votes=tuple(others),
        task=sample.task,
        size=sample.sizes[0] if sample.sizes else None,
        resized=resized,
        regions=tuple(sample.regions[i] for i in here),
        rasters=tuple(stored for i, stored in sample.rasters if i in here),
        metrics=sample.metrics,
        said=coord,
    )
    otherwise = "per_mille" if coord in (None, "resized") else coord
    return replace(gold, coord=coord_of(gold, otherwise))


def default_metrics(gold: Gold) -> tuple[str, ...]:
    """Names of the metrics that a sample gets when nobody asks for others.

    The sample's own `metrics`, else those of its task (`TASK_METRICS`; `refcoco_val` is a
    `refcoco`), else by what its answer is: boxes, points, a table, a number, several numbers in up
    to 5 words, up to 5 words, or a longer text; a Chinese or Japanese character is a word. Those
    that do not fit the sample are left out, and those of boxes and points where the gold answer
    writes none: what is asked then is something else, such as a count.
    """
    names = gold.metrics
    if not names:
        tasks = [task for task in TASK_METRICS if re.match(rf"{task}(?![a-z])", gold.task)]
        names = TASK_METRICS[max(tasks, key=len)] if tasks else _by_answer(gold)
    return tuple(name for name in names if _by_default(METRICS[name], gold)) or ("exact_match",)


def _by_default(metric: Metric, gold: Gold) -> bool:
    written = gold.answers[0]
    if metric.needs in ("boxes", "places") and not gold.metrics:
        return bool(boxes_in(written, gold) or points_in(written, gold))
    return metric.fits(gold)


def task_metrics(golds: Iterable[Gold]) -> tuple[str, ...]:
    """What any of a task's samples gets by `default_metrics`, in the order of `METRICS`.

    Its samples are all measured by these, each by those that fit it, so that a figure is not of the
    numbers, say, among its answers.
    """
    found = {name for gold in golds for name in default_metrics(gold)}
    return tuple(name for name in METRICS if name in found)


def _by_answer(gold: Gold) -> tuple[str, ...]:
    answer = gold.answers[0]
    marked = any(mark in answer for mark in "[(<{")  # bare numbers may count anything
    if marked and boxes_in(answer, gold):
        return _BOXES
    if ("<" in answer or answer.lstrip()[:1] in tuple("[({`")) and points_in(answer, gold):
        return _POINTS
    if _has_table(gold):
        return ("table_f1", "number_set_similarity")
    if number(answer):
        return ("exact_match", "relaxed_accuracy")
    short = len(_WORD.findall(answer)) <= 5
    if short and answers.coordinates("", answer)[1] > 1:
        return ("exact_match", "coordinates")
    if short:
        return ("exact_match", "normalised_match", "anls")
    return ("exact_match", "token_f1", "cer", "wer")


def _of_answers(metric: Callable[..., float]) -> Callable[[str, Gold], Score]:
    return lambda predicted, gold: Score(metric(predicted, gold.answers), 1.0)


def _of_votes(predicted: str, gold: Gold) -> Score:
    return Score(vqa.vqa_accuracy(predicted, gold.votes), 1.0)


def _of_counts(metric: Callable[..., tuple[float, float]], **options) -> Callable:
    return lambda predicted, gold: Score(*metric(predicted, gold.answers, **options))


def _of_boxes(metric: Callable[..., float]) -> Callable[[str, Gold], Score]:
    def score(predicted: str, gold: Gold) -> Score:
        return Score(metric(predicted_boxes(predicted, gold), gold_boxes(gold)), 1.0)

    return score


def _of_points(metric: Callable[..., float]) -> Callable[[str, Gold], Score]:
    def score(predicted: str, gold: Gold) -> Score:
        return Score(metric(predicted_points(predicted, gold), gold_places(gold)), 1.0)

    return score


def _has_table(gold: Gold) -> bool:
    table = tables.parse_table(gold.answers[0])
    return len(table.headers) > 1 and any(len(row) > 1 for row in table.rows)


_HAS: dict[str, Callable[[Gold], bool]] = {
    "answer": lambda gold: True,
    "votes": lambda gold: len(gold.votes) >= vqa.ENOUGH_VOTES,
    "number": lambda gold: any(answers.coordinates("", text)[1] for text in gold.answers),
    "table": _has_table,
    "boxes": lambda gold: bool(gold_boxes(gold)),
    "places": lambda gold: bool(gold.rasters) or len(gold_places(gold)) > 0,
}

_ALL = (
    Metric("exact_match", "exact match", True, "", "answer", _of_answers(answers.exact_match)),
    Metric(
        "normalised_match",
        "match but for case, punctuation, articles",
        True,
        "arXiv 1505.00468 (VQA)",
        "answer",
        _of_answers(answers.normalised_match),
    ),
    Metric(
        "vqa_accuracy",
        "VQA accuracy",
        True,
        "arXiv 1505.00468 (VQA)",
        "votes",
        _of_votes,
    ),
    Metric(
        "relaxed_accuracy",
        "relaxed accuracy, years exact",
        True,
        "arXiv 2203.10244 (ChartQA)",
        "answer",
        _of_answers(answers.relaxed_accuracy),
    ),
    Metric(
        "relaxed_accuracy_pix2struct",
        "relaxed accuracy as pix2struct's code",
        True,
        "arXiv 2210.03347 (Pix2Struct)",
        "answer",
        _of_answers(answers.relaxed_accuracy_pix2struct),
    ),
    Metric("anls", "ANLS", True, "arXiv 1907.00490", "answer", _of_answers(answers.anls)),
    Metric(
        "squad_match",
        "exact match of SQuAD",
        True,
        "arXiv 1606.05250 (SQuAD)",
        "answer",
        _of_answers(answers.squad_match),
    ),
    Metric(
        "token_f1",
        "F1 of words",
        True,
        "arXiv 1606.05250 (SQuAD)",
        "answer",
        _of_answers(answers.token_f1),
    ),
    Metric(
        "contains",
        "the gold is in the answer",
        True,
        "arXiv 2305.07895 (OCRBench)",
        "answer",
        _of_answers(answers.contains),
    ),
    Metric(
        "contains_formula",
        "the gold is in the answer, without white space",
        True,
        "arXiv 2305.07895 (OCRBench)",
        "answer",
        _of_answers(answers.contains_formula),
    ),
    Metric(
        "coordinates",
        "accuracy per coordinate",
        True,
        "arXiv 2511.12738 (KLAL)",
        "number",
        _of_counts(answers.coordinates),
    ),
    Metric(
        "table_f1",
        "RMS-F1 of tables",
        True,
        "arXiv 2212.10505 (DePlot)",
        "table",
        _of_answers(tables.table_f1),
    ),
    Metric(
        "number_set_similarity",
        "RNSS of tables",
        True,
        "arXiv 2203.10244 (ChartQA)",
        "table",
        _of_answers(tables.number_set_similarity),
    ),
    Metric(
        "box_accuracy",
        "IoU@.5",
        True,
        "arXiv 1511.02283 (RefCOCOg)",
        "boxes",
        _of_boxes(boxes.box_accuracy),
    ),
    Metric("box_iou", "mean IoU", True, "", "boxes", _of_boxes(boxes.box_iou)),
    Metric(
        "centre_accuracy",
        "centre of the box in the gold box",
        True,
        "arXiv 2401.10935 (ScreenSpot)",
        "boxes",
        _of_boxes(boxes.centre_accuracy),
    ),
    Metric(
        "pointing_accuracy",
        "first point in the place",
        True,
        "arXiv 1608.00507 (pointing game)",
        "places",
        _of_points(boxes.pointing_accuracy),
    ),
    Metric(
        "pointing_f1",
        "F1 of points",
        True,
        "arXiv 2409.17146 (PixMo)",
        "places",
        _of_points(boxes.pointing_f1),
    ),
    Metric("cer", "character error rate", False, "jiwer", "answer", _of_counts(reading.cer)),
    Metric("wer", "word error rate", False, "jiwer", "answer", _of_counts(reading.wer)),
    Metric(
        "cer_plain",
        "character error rate without case and punctuation",
        False,
        "jiwer",
        "answer",
        _of_counts(reading.cer, normalise=reading.plain),
    ),
    Metric(
        "wer_plain",
        "word error rate without case and punctuation",
        False,
        "jiwer",
        "answer",
        _of_counts(reading.wer, normalise=reading.plain),
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

_BOXES = ("box_accuracy", "box_iou", "centre_accuracy")
_POINTS = ("pointing_accuracy", "pointing_f1")
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")  # scripts without spaces: a character
_READING = ("exact_match", "cer", "wer")
_CHARTS = ("relaxed_accuracy", "relaxed_accuracy_pix2struct")
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "chartqa": _CHARTS,
    "chart_to_table": ("table_f1", "number_set_similarity"),
    "docvqa": ("anls", "exact_match"),
    "infographicvqa": ("anls", "exact_match"),
    "squad": ("squad_match", "token_f1"),
    "textvqa": ("vqa_accuracy",),
    "vqav2": ("vqa_accuracy",),
    "refcoco": _BOXES,
    "refcocog": _BOXES,
    "pixmo_points": ("exact_match", *_POINTS),
    "grid_patch": ("exact_match", "coordinates"),
    "pointing": ("exact_match", "coordinates"),
    "page": _READING,
    "chart": ("exact_match", "anls"),
    "line_intersection": ("exact_match",),
    "line_tracing": ("exact_match",),
    "word_page": _READING,
    "ocr": _READING,
    "text_page": _READING,
}
