"""Metrics of tables that are written as text: what chart-to-table models are measured by.

Source: Liu et al., DePlot, arXiv 2212.10505, section 3.2, and its code (github.com/google-research/
google-research, deplot/metrics.py).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

from groundkern.trainer.metrics.numbers import number

TEXT_THRESHOLD = 0.5
NUMBER_THRESHOLD = 0.1

Golds = str | Sequence[str]

_NEW_LINE = re.compile(r"\s*(?:<0x0A>|<br\s*/?>|\r\n|\r|\n)[ \t]*", re.IGNORECASE)
_FENCE = re.compile(r"```\w*")
_RULE = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")
_SPACED = re.compile(r"(?:(?<=\s)|^)\|(?=\s|$)")
_PIPE = re.compile(r"(?<!\\)\|")
_ORDER = 1e-6  # of keys that fit equally well, the one with the nearer value


class Table(NamedTuple):
    """A table in lower case: its title, if there is one, the column headers, and the rows."""

    title: str | None
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def transposed(self) -> Table:
        """Rows as columns; short rows are filled with empty cells."""
        if not self.headers and not self.rows:
            return self
        turned = list(zip_longest(self.headers, *self.rows, fillvalue=""))
        return Table(self.title, turned[0], tuple(turned[1:])) if turned else self

    def entries(self) -> list[tuple[str, str]]:
        """(row header and column header, value) of each cell, and ("title", title)."""
        found = [] if self.title is None else [("title", self.title)]
        if len(self.headers) > 1:
            for row in self.rows:
                cells = zip(self.headers[1:], row[1:], strict=False)
                found += [(f"{row[0]} {header}", value) for header, value in cells]
        return found


class Scores(NamedTuple):
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def parse_table(text: str) -> Table:
    r"""The table in a text; whatever is none becomes a table of headers alone.

    Read are DePlot's lines (`<0x0A>` or a new line between rows, ` | ` between cells, a first line
    `TITLE | ...`), Markdown with its rule under the headers, `|` without spaces, and CSV with
    commas, semicolons or tabs where no line has a `|`. A fence of back-ticks is taken off, `<br>`
    counts as a new line, `\|` in Markdown is a character of a cell.
    """
    lines = [line.strip() for line in _NEW_LINE.split(_FENCE.sub("", text.lower()))]
    lines = [line for line in lines if line]
    piped = [line for line in lines if "|" in line]
    if not piped:
        rows = _comma_separated(lines)
    elif sum(line.startswith("|") for line in piped) * 2 > len(piped):
        rows = [_markdown_row(line) for line in piped if not _RULE.fullmatch(line)]
    else:
        spaced = any(_SPACED.search(line) for line in piped)
        pattern = _SPACED if spaced else _PIPE
        kept = [line for line in lines if not ("|" in line and _RULE.fullmatch(line))]
        rows = [tuple(cell.strip() for cell in pattern.split(line)) for line in kept]
    title = None
    if rows and rows[0][0] == "title" and len(rows[0]) > 1:
        title, rows = " | ".join(rows[0][1:]).strip(" |"), rows[1:]
    return Table(title, rows[0] if rows else (), tuple(rows[1:]))


def table_f1(predicted: str, gold: Golds) -> float:
    """RMS-F1: how much of a table is there, by headers and values; see `table_scores`."""
    return table_scores(predicted, gold).f1


def table_scores(predicted: str, gold: Golds) -> Scores:
    """Relative mapping similarity of tables: precision, recall and F1, from 0 to 1.

    Each cell is an entry: its row header and column header together are its key. Keys of both
    tables are matched so that their similarity (1 minus the edit distance over the longer length, 0
    below a half) is highest; of a pair, that times the similarity of the values counts: of numbers
    1 minus the relative error to the gold, 0 from an error of 0.1 on; of texts as of keys. The sum
    over the predicted entries is the precision, over the gold's the recall. The title is one more
    entry. The predicted table counts as it is or transposed, whichever fits better.

    Differences from DePlot's code: F1 is the harmonic mean (its per-sample "f1" is a copy of the
    recall); a gold 0 is a number (there 0 and 0.0 are texts); separators of thousands and currency
    signs are read; the same key twice is two entries (there the last), so that a model that repeats
    itself loses precision; of keys that fit equally well the one with the nearer value is taken.

    Args:
        predicted: what the model wrote, see `parse_table`.
        gold: the right table, or several of which the best counts.

    Returns:
        Of the gold and the orientation with the highest F1. Without entries on either side 1, on
        one side an F1 of 0.
    """
    table = parse_table(predicted)
    golds = [parse_table(text) for text in ([gold] if isinstance(gold, str) else gold)]
    found = [_similar(turned, g) for g in golds for turned in (table, table.transposed())]
    return max(found, key=lambda scores: scores.f1, default=Scores(0.0, 0.0, 0.0))


def number_set_similarity(predicted: str, gold: Golds) -> float:
    """RNSS: how near a table's numbers are to the gold's, wherever they stand.

    Numbers are matched so that the sum of relative errors, each at most 1, is lowest; the value is
    1 minus that sum over the larger count. As in DePlot's code a number too many costs only the
    share it adds to the count. Unlike there a gold 0 fits just 0 (there just anything else).

    Source: Masry et al., ChartQA, arXiv 2203.10244; Liu et al., DePlot, arXiv 2212.10505.
    """
    found = _numbers(parse_table(predicted))
    golds = [_numbers(parse_table(text)) for text in ([gold] if isinstance(gold, str) else gold)]
    return max((_number_sets(found, numbers) for numbers in golds), default=0.0)


def _comma_separated(lines: list[str]) -> list[tuple[str, ...]]:
    counts = {mark: sum(mark in line for line in lines) for mark in ("\t", ";", ",")}
    mark = max(counts, key=counts.__getitem__)
    try:
        rows = list(csv.reader(lines, delimiter=mark, skipinitialspace=True))
    except csv.Error:
        rows = [line.split(mark) for line in lines]
    return [tuple(cell.strip() for cell in row) for row in rows if row]


def _markdown_row(line: str) -> tuple[str, ...]:
    line = line.removeprefix("|")
    line = line if line.endswith("\\|") else line.removesuffix("|")
    return tuple(cell.strip().replace("\\|", "|") for cell in _PIPE.split(line))


def _similar(predicted: Table, gold: Table) -> Scores:
    p, g = predicted.entries(), gold.entries()
    if not p or not g:
        return Scores(float(not p), float(not g), float(not p and not g))
    keys = _texts([key for key, _ in p], [key for key, _ in g])  # [p, g]
    values = _values([value for _, value in p], [value for _, value in g])
    rows, columns = linear_sum_assignment(keys + _ORDER * values, maximize=True)
    total = float((keys * values)[rows, columns].sum())
    precision, recall = total / len(p), total / len(g)
    f1 = 2 * precision * recall / (precision + recall) if total else 0.0
    return Scores(precision, recall, f1)


def _texts(predicted: list[str], gold: list[str]) -> NDArray[np.float64]:
    """[p, g]: 1 minus the normalised edit distance, 0 below the threshold."""
    similar = cdist(predicted, gold, scorer=Levenshtein.normalized_similarity, dtype=np.float64)
    return np.where(similar >= TEXT_THRESHOLD, similar, 0.0)


def _values(predicted: list[str], gold: list[str]) -> NDArray[np.float64]:
    """[p, g]: similarity of numbers where both are numbers, and else of texts."""
    p, g = (np.array([_value(text) for text in texts]) for texts in (predicted, gold))
    with np.errstate(all="ignore"):
        error = np.abs((p[:, None] - g) / g)
    near = np.where(error < NUMBER_THRESHOLD, 1 - error, 0.0)
    near = np.where(g == 0, p[:, None] == 0, near)
    numbers = ~np.isnan(p)[:, None] & ~np.isnan(g)
    return np.where(numbers, near, _texts(predicted, gold))


def _value(text: str) -> float:
    """The number a cell is, percent as hundredths; NaN for text."""
    found = number(text)
    if found is None:
        return np.nan
    return found.value / 100 if found.percent else found.value


def _numbers(table: Table) -> list[float]:
    cells = [cell for row in (table.headers, *table.rows) for cell in row]
    return [value for value in map(_value, cells) if not np.isnan(value)]


def _number_sets(predicted: list[float], gold: list[float]) -> float:
    if not predicted or not gold:
        return float(not predicted and not gold)
    p, g = np.array(predicted)[:, None], np.array(gold)
    with np.errstate(all="ignore"):
        error = np.minimum(1.0, np.abs((p - g) / g))
    error = np.where(g == 0, p != 0, error)
    rows, columns = linear_sum_assignment(error)
    return 1 - float(error[rows, columns].sum()) / max(len(predicted), len(gold))
