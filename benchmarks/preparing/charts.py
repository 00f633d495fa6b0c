"""How good `marks` is: charts drawn from known tables, answers with known links.

`python -m benchmarks.preparing.charts --count 200 --ocr tesseract` prints precision and recall of
phrase-to-region links. Values are written differently in the answer and in the chart ("1,234" and
"1234", "45%" and "45 percent"), labels wrap, equal values occur twice, and each answer holds a
computed number that is printed nowhere, or only by chance as an axis tick or another bar's value.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from benchmarks.preparing.links import Link, Score
from groundkern.trainer.prepare.marks.frames import read_chart
from groundkern.trainer.prepare.marks.grouping import Box, PrintedWord
from groundkern.trainer.prepare.marks.matching import PrintedText
from groundkern.trainer.prepare.ocr.settings import OcrSettings

_CATEGORIES = (
    ["Germany", "France", "Spain", "United Kingdom", "South Korea", "Brazil", "New Zealand"],
    ["Renewable energy", "Natural gas", "Coal", "Nuclear power", "Oil"],
    ["2016", "2017", "2018", "2019", "2020", "2021"],
    ["Jan", "Feb", "Mar", "Apr", "Jun", "Aug", "Oct"],
    ["Customer support", "Research and development", "Marketing", "Human resources", "Sales"],
    ["Q1", "Q2", "Q3", "Q4"],
)
_SERIES = (["Laptops", "Phones"], ["Urban areas", "Rural areas"], ["Men", "Women"])
_MEASURES = ("Revenue", "Average cost", "Number of visitors", "Market share", "Energy consumption")
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_STYLES = {  # as printed; as an answer may say it
    "thousands": ("{:,.0f}", ("{:.0f}", "{:,.0f}")),
    "plain": ("{:.0f}", ("{:.0f}", "{:,.0f}")),
    "counts": ("{:.0f}", ("{:.0f}", "{:.1f}")),
    "decimal": ("{:.1f}", ("{:.1f}", "{:.2f}")),
    "percent": ("{:.1f}%", ("{:.1f}%", "{:.1f} %", "{:.1f} percent", "{:.2f}%")),
    "dollars": ("${:,.2f}", ("${:,.2f}", "{:.2f}")),
}
_SPOKEN_RANGE = {"thousands": (800, 9999), "plain": (5, 999), "counts": (1, 40), "decimal": (1, 60)}


@dataclass(frozen=True)
class Chart:
    """A drawn chart: every word with its box, an answer about it, and the answer's links."""

    image: Image.Image
    words: tuple[PrintedWord, ...]
    answer: str
    links: tuple[Link, ...]


def draw_chart(seed: int) -> Chart:
    """A chart and an answer about it; the same ones for the same seed."""
    rng = random.Random(seed)
    categories = rng.choice(_CATEGORIES)
    categories = categories[: rng.randint(3, len(categories))]
    series = rng.choice(_SERIES) if rng.random() < 0.4 else [""]
    style = rng.choice(list(_STYLES))
    low, high = _SPOKEN_RANGE.get(style, (1, 99))
    table = {(s, c): rng.uniform(low, high) for s in series for c in categories}
    digits = 0 if style in ("thousands", "plain", "counts") else 1
    table = {key: round(value, digits) for key, value in table.items()}
    measure = rng.choice(_MEASURES)
    figure = Figure(figsize=(8, 5), dpi=rng.choice((100, 120, 150)), layout="tight")
    canvas = FigureCanvasAgg(figure)
    artists = _draw(figure, rng, table, series, categories, _STYLES[style][0], measure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    printed = {id(text): _lines_of(text, canvas) for text in _shown(figure.axes[0])}
    words = tuple(word for lines in printed.values() for line in lines for word in line)
    answer, mentions = _answer(rng, table, series, categories, _STYLES[style][1], measure)
    links = []
    for start, stop, key in mentions:
        lines = printed[id(artists[key])]
        if key == "measure":
            lines = [lines[0][: len(measure.split())]]
        for line in lines:
            links.append(Link(start, stop, _around(line)))
    return Chart(image, words, answer, tuple(links))


def _draw(figure, rng, table, series, categories, form, measure) -> dict[object, Text]:
    """Draws the table; returns which text shows what."""
    axes = figure.add_subplot()
    flat = rng.random() < 0.3
    line = not flat and len(series) == 1 and rng.random() < 0.3
    artists: dict[object, Text] = {}
    shown = [c.replace(" ", "\n", 1) if len(c) > 9 and not flat else c for c in categories]
    width = 0.8 / len(series)
    for n, name in enumerate(series):
        heights = [table[name, c] for c in categories]
        at = np.arange(len(categories)) + n * width
        color = _COLORS[n] if len(series) > 1 else rng.choice(_COLORS)
        if line:
            axes.plot(at, heights, marker="o", color=color)
        elif flat:
            axes.barh(at, heights, width * 0.9, color=color, label=name)
        else:
            axes.bar(at, heights, width * 0.9, color=color, label=name)
        for x, y, c in zip(at, heights, categories):
            place, side = ((y, x), ("left", "center")) if flat else ((x, y), ("center", "bottom"))
            artists[name, c] = axes.annotate(
                form.format(y),
                place,
                (4, 0) if flat else (0, 4),
                textcoords="offset points",
                ha=side[0],
                va=side[1],
                fontsize=10 if len(series) == 1 else 8,
            )
    centers = np.arange(len(categories)) + width * (len(series) - 1) / 2
    axis = axes.yaxis if flat else axes.xaxis
    axis.set_ticks(centers, shown, fontsize=10)
    artists.update(zip(categories, axis.get_ticklabels()))
    axes.margins(**{"x" if flat else "y": 0.15})
    artists["measure"] = axes.set_title(f"{measure} by group, {rng.randint(1990, 2012)}")
    if len(series) > 1:
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        artists.update(zip(series, legend.get_texts()))
    return artists


def _answer(rng, table, series, categories, forms, measure) -> tuple[str, list[tuple]]:
    """A sentence or two about two cells, and (start, stop, key) of what is printed."""
    name = rng.choice(series)
    first, second = rng.sample(categories, 2)
    form = rng.choice(forms)
    a, b = table[name, first], table[name, second]
    who = [" for ", (name, name)] if name else []
    said = lambda key, value: (form.format(value), (name, key))  # noqa: E731
    group = [(measure.lower(), "measure")]
    computed = form.format(round(abs(a - b), 1))
    text = rng.choice(
        (
            ["The ", *group, *who, " is ", said(first, a), " in ", (first, first), " and ",
             said(second, b), " in ", (second, second), f", a difference of {computed}."],
            [(first, first), *who, " stands at ", said(first, a), ", compared with ",
             said(second, b), " of ", (second, second), f". That is {computed} apart."],
            ["Looking at ", (second, second), " first", *who, ": it has ", said(second, b),
             f". Add {computed} or take it away to get the ", said(first, a), " in ",
             (first, first), "."],
        )
    )  # fmt: skip
    answer, mentions = "", []
    for part in text:
        words, key = (part, None) if isinstance(part, str) else part
        if key is not None:
            mentions.append((len(answer), len(answer) + len(words), key))
        answer += words
    return answer, mentions


def _shown(axes) -> list[Text]:
    """The texts of a chart that are drawn: matplotlib keeps labels of ticks beyond the axes too."""
    texts = [axes.title, *axes.texts]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels()):
            texts += [label] if low <= place <= high else []
    legend = axes.get_legend()
    return texts + (legend.get_texts() if legend is not None else [])


def _lines_of(text: Text, canvas: FigureCanvasAgg) -> list[list[PrintedWord]]:
    """The words of an upright text, line by line, with the boxes they are drawn in."""
    content = text.get_text()
    if not content.strip() or not text.get_visible() or text.get_rotation() % 360:
        return []
    renderer, height = canvas.get_renderer(), canvas.get_width_height()[1]
    extent = text.get_window_extent(renderer)
    measure = lambda words: renderer.get_text_width_height_descent(  # noqa: E731
        words, text.get_fontproperties(), ismath=False
    )[0]
    rows = content.split("\n")
    tall = extent.height / len(rows)
    found = []
    for r, row in enumerate(rows):
        left = extent.x0 + (extent.width - measure(row)) / 2
        top = height - extent.y1 + r * tall
        at, line = 0, []
        for word in row.split(" "):
            x0, x1 = left + measure(row[:at]), left + measure(row[: at + len(word)])
            line.append(PrintedWord(word, tuple(map(float, (x0, top, x1, top + tall)))))
            at += len(word) + 1
        found.append(line)
    return found


def _around(words: list[PrintedWord]) -> Box:
    left, top, right, bottom = zip(*(word.box for word in words))
    return min(left), min(top), max(right), max(bottom)


@dataclass
class ChartScore(Score):
    """What came out of some charts.

    Attributes:
        ocr_seconds, match_seconds: CPU seconds.
    """

    charts: int = 0
    ocr_seconds: float = 0.0
    match_seconds: float = 0.0


def measure_charts(
    seeds: Iterator[int] | range,
    ocr: OcrSettings | None,
    *,
    ambiguous: str = "drop",
    scales: str = "last",
) -> ChartScore:
    """Draws a chart for each seed, labels it, and counts links.

    Args:
        seeds: of `draw_chart`.
        ocr: how to read; None uses the words as they were drawn.
        ambiguous, scales: options of `PrintedText`.
    """
    score = ChartScore()
    for seed in seeds:
        chart = draw_chart(seed)
        words, began = list(chart.words), _cpu()
        if ocr is not None:
            found = read_chart(chart.image, ocr)
            words = [PrintedWord(word.text, word.box) for word in found if word.confidence >= 0.3]
        read = _cpu()
        matches = PrintedText(words, scales=scales).matches(chart.answer, ambiguous)
        score.ocr_seconds += read - began
        score.match_seconds += _cpu() - read
        score.charts += 1
        score.add(chart.answer, chart.links, matches, str(seed))
    return score


def _cpu() -> float:
    """CPU seconds of this process and of the programs it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing.charts")
    parser.description = "Precision and recall of marks on charts drawn from known tables."
    parser.add_argument("--count", type=int, default=200, help="charts")
    parser.add_argument("--seed", type=int, default=0, help="of the first chart")
    parser.add_argument("--ocr", choices=("drawn", "rapid", "tesseract", "paddle"), default="drawn")
    parser.add_argument("--ambiguous", choices=("drop", "union"), default="drop")
    parser.add_argument("--scales", choices=("last", "keep", "drop"), default="last")
    parser.add_argument("--show", type=Path, help="folder for the charts")
    parser.add_argument("--wrong", action="store_true", help="print every wrong link")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    if arguments.show:
        arguments.show.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            draw_chart(seed).image.save(arguments.show / f"{seed}.png")
    ocr = None
    if arguments.ocr != "drawn":
        ocr = OcrSettings(engine=arguments.ocr, page_mode=11)
    score = measure_charts(seeds, ocr, ambiguous=arguments.ambiguous, scales=arguments.scales)
    print(f"{score.charts} charts: {score}")
    print(f"{score.charts / max(score.match_seconds, 1e-9):.0f} images/s per core matched", end="")
    print(f", {score.charts / score.ocr_seconds:.2f} read" if ocr else "")
    if arguments.wrong:
        print("\n".join(score.wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
