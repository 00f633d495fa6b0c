"""`prepare render`: texts drawn word by word on the grid of visual tokens (DV-SFT, label-to-image).

A word ends at the right edge of a visual token, which gets its label in training; a word over
several visual tokens labels only the last. Source: DV-SFT's paper, label-to-image; (D1).
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundkern.trainer.prepare.arguments import add_common, named, positive

if TYPE_CHECKING:
    from groundkern.trainer.drawing.pages import Face, Placed
    from groundkern.trainer.prepare.passages import Passage
    from groundkern.trainer.prepare.pipeline import Made
    from groundkern.trainer.prepare.sources import Item

HELP = "draw texts as pages whose words are aligned to the visual tokens (DV-SFT)"
CELL = 28  # pixels of a visual token of Qwen2.5-VL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare render`."""
    parser.add_argument("input", type=Path, help="JSON lines, Parquet, Arrow or a saved data set")
    parser.add_argument("--split", help="of a saved data set that has several")
    fields = parser.add_argument_group(
        "fields of a record that is no sample; a.b is b of a, the first of a list"
    )
    fields.add_argument("--text-field", default="text", help="what is drawn")
    fields.add_argument("--question-field", default="question", help="what is asked, if there")
    fields.add_argument("--answer-field", default="answer", help="the answer, if there")
    fields.add_argument(
        "--question", default="Read the text.", help="asked where a record has none"
    )
    page = parser.add_argument_group("pages")
    page.add_argument("--model", type=Path, help="model folder, whose visual tokens are the grid")
    page.add_argument(
        "--cell", type=positive(int), help=f"pixels of a visual token (default: {CELL})"
    )
    page.add_argument("--columns", type=positive(int), default=18, help="visual tokens in a line")
    page.add_argument("--rows", type=positive(int), default=18, help="lines on a page at most")
    page.add_argument(
        "--max-pages", type=positive(int), default=4, help="pages of a sample at most"
    )
    page.add_argument(
        "--font", nargs="+", default=["DejaVu Sans"], help="names or files; one is drawn by lot"
    )
    page.add_argument(
        "--font-size", type=positive(float), help="pixels to the em (default: half a cell)"
    )
    page.add_argument(
        "--light-on-dark", type=float, default=0.0, help="fraction of samples with a dark page"
    )
    page.add_argument("--seed", type=int, default=0, help="of colours and fonts")
    texts = parser.add_argument_group("which texts")
    texts.add_argument("--perplexity-model", type=Path, help="causal language model's folder")
    texts.add_argument("--max-perplexity", type=float, help="leave out texts above it")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draws, writes, and prints how much."""
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.drawing.pages import Face, load_font
    from groundkern.trainer.prepare.running import run_work
    from groundkern.trainer.prepare.sources import open_source

    filtering = arguments.perplexity_model is not None
    if filtering != (arguments.max_perplexity is not None):
        raise ConfigError("give both --perplexity-model and --max-perplexity, or neither")
    cell = _cell(arguments.model, arguments.cell)
    size = arguments.font_size or cell / 2
    for name in arguments.font:
        Face(load_font(name, size), cell)
    if filtering:
        from groundkern.trainer.prepare.perplexity import scorer

        scorer(arguments.perplexity_model)
    rows = highest_page(arguments.model, cell, arguments.columns, arguments.rows)
    work = Render(
        folder=arguments.output.stem,
        fields=(arguments.text_field, arguments.question_field, arguments.answer_field),
        cell=cell,
        grid=(arguments.columns, rows),
        fonts=tuple(arguments.font),
        font_size=size,
        **named(arguments, "question", "model", "max_pages", "light_on_dark", "seed"),
        **named(arguments, "perplexity_model", "max_perplexity"),
    )
    source = open_source(arguments.input, split=arguments.split)
    counts = run_work(arguments, source, work, unit="text").counts
    if counts["pages"]:
        cells = counts["visual_tokens"] / counts["pages"]
        words = counts["words_drawn"] / counts["pages"]
        print(
            f"{counts['pages']:,} pages; a page has {words:.1f} words on {cells:.1f} visual tokens"
            + (
                f"; {counts['words_broken']:,} words longer than a line, broken and not labelled"
                if counts["words_broken"]
                else ""
            )
        )
    return 0


@dataclass(frozen=True)
class Render:
    """Draws the text of one record; see `add_arguments`.

    With an answer, all of the text must fit into `max_pages`. Without, the answer is the text, and
    a longer one becomes several samples.
    """

    folder: str
    fields: tuple[str, str, str] = ("text", "question", "answer")
    question: str = "Read the text."
    model: Path | None = None
    cell: int = CELL
    grid: tuple[int, int] = (18, 18)  # columns, rows
    max_pages: int = 4
    fonts: tuple[str, ...] = ("DejaVu Sans",)
    font_size: float = CELL / 2
    light_on_dark: float = 0.0
    seed: int = 0
    perplexity_model: Path | None = None
    max_perplexity: float | None = None

    def __call__(self, item: Item) -> Made:
        from groundkern.trainer.drawing.pages import Face, load_font, set_lines
        from groundkern.trainer.prepare.passages import Word
        from groundkern.trainer.prepare.pipeline import LeftOut, Made

        passage = self._passage(item)
        text, answer = passage.text, passage.answer
        rng = random.Random(f"{self.seed} {item.index}")
        face = Face(load_font(rng.choice(self.fonts), self.font_size), self.cell)
        spans, words = self._words(item, text, face)
        self._check_perplexity(item, text)
        columns, rows = self.grid
        lines = list(set_lines(words, face, columns))
        pages = [lines[i : i + rows] for i in range(0, len(lines), rows)]
        if answer is not None and len(pages) > self.max_pages:
            wanted = f"a text of at most {self.max_pages} pages (--max-pages)"
            raise LeftOut(f"{item.where}: expected {wanted}, got {len(pages)} pages")
        samples, images = [], {}
        counts = {"pages": len(pages), "words_drawn": 0, "words_broken": 0, "visual_tokens": 0}
        colors = self._colors(rng)
        whole = iter([span for span, word in zip(spans, words) if face.cells(word) <= columns])
        for first in range(0, len(pages), self.max_pages):
            shown = pages[first : first + self.max_pages]
            names, found, placed = [], [], []
            for number, page in enumerate(shown):
                image, drawn = self._draw(page, face, colors)
                names.append(self._name(item.index, first + number))
                images[names[-1]] = image
                several = {"image": number} if len(shown) > 1 else {}
                found += [{"text": t, "box": b, **several} for t, b in drawn]
                placed += [Word(*span, b, number) for (_, b), span in zip(drawn, whole)]
                counts["visual_tokens"] += image.width * image.height // self.cell**2
            counts["words_drawn"] += len(found)
            counts["words_broken"] += sum(
                not piece.whole for page in shown for line in page for piece in line
            )
            read = _text_of(shown) if answer is None else answer
            samples.append(passage.asked(names, read, found, placed))
        return Made(samples, images, counts)

    def _passage(self, item: Item) -> Passage:
        from groundkern.trainer.data.images import wrong
        from groundkern.trainer.prepare.passages import Passage, passage_of

        text, question, answer = (_field(item.value, name) for name in self.fields)
        if text is None and isinstance(item.value, dict) and "messages" in item.value:
            return passage_of(item)
        found = zip(self.fields, (text, question, answer))
        for name, value in found:
            if value is not None and not isinstance(value, str):
                raise wrong(item.where, name, "a text", f"{type(value).__name__}")
        if text is None or not text.strip():
            raise wrong(item.where, self.fields[0], "a text to draw", "none")
        if (answer is None or not answer.strip()) and question is not None:
            raise wrong(item.where, self.fields[2], "an answer to the question", "none")
        return Passage(text, question or self.question, answer)

    def _words(self, item: Item, text: str, face: Face) -> tuple[list[tuple[int, int]], list[str]]:
        """The places of the visible words in the text, and what is drawn of each."""
        from groundkern.trainer.data.images import wrong
        from groundkern.trainer.drawing.pages import undrawable, visible
        from groundkern.trainer.prepare.passages import stretches

        spans = [span for span in stretches(text) if visible(text[slice(*span)])]
        words = visible(text)
        if not words:
            raise wrong(item.where, self.fields[0], "visible words", "none")
        for word in words:
            if why := undrawable(word, face.font):
                raise wrong(item.where, self.fields[0], "characters that can be drawn", why)
        return spans, words

    def _check_perplexity(self, item: Item, text: str) -> None:
        if self.max_perplexity is None:
            return
        from groundkern.trainer.prepare.perplexity import scorer
        from groundkern.trainer.prepare.pipeline import LeftOut

        value = scorer(self.perplexity_model)(text)
        if not value <= self.max_perplexity:
            wanted = f"a text of perplexity up to {self.max_perplexity:g} (--max-perplexity)"
            raise LeftOut(f"{item.where}: expected {wanted}, got {value:.1f}")

    def _colors(self, rng: random.Random) -> tuple:
        from groundkern.trainer.drawing.pages import dark_and_light

        dark, light = dark_and_light(rng)
        return (light, dark) if rng.random() < self.light_on_dark else (dark, light)

    def _draw(self, page: list[list[Placed]], face: Face, colors: tuple) -> tuple:
        """An image as high as its lines need (or the processor wants), and its words."""
        from PIL import Image

        from groundkern.trainer.drawing.pages import draw_lines

        ink, paper = colors
        columns, most = self.grid
        rows = page_rows(self.model, self.cell, columns, len(page), most)
        image = Image.new("RGB", (columns * self.cell, rows * self.cell), paper)
        drawn = draw_lines(image, page, face, ink)
        return image, [word for line in drawn for word in line]

    def _name(self, index: int, page: int) -> str:
        """At most 1,000 texts to a folder."""
        return f"{self.folder}/{index // 1000:04d}/{index:07d}-{page}.png"


@cache
def page_rows(model: Path | None, cell: int, columns: int, lines: int, most: int) -> int:
    """The fewest rows, from `lines` to `most`, of a page whose cells become visual tokens."""
    if model is None:
        return lines
    from groundkern.trainer.prepare.grid import visual_grid

    grid = visual_grid(model)
    return next(rows for rows in range(lines, most + 1) if grid.aligned(cell, columns, rows))


def highest_page(model: Path | None, cell: int, columns: int, rows: int) -> int:
    """The most rows, up to `rows`, of a page whose cells become the model's visual tokens.

    Raises:
        ConfigError: there is none.
    """
    if model is None:
        return rows
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.prepare.grid import visual_grid

    fit = [n for n in range(1, rows + 1) if visual_grid(model).aligned(cell, columns, n)]
    if not fit:
        raise ConfigError(
            f"`columns`: expected a page that the processor of {model} sees so as to get {columns} "
            f"visual tokens a line, got cells of {cell} pixels and 1 to {rows} lines"
        )
    return fit[-1]


def _cell(model: Path | None, cell: int | None) -> int:
    if model is None or cell is not None:
        return cell or CELL
    from groundkern.trainer.prepare.grid import visual_grid

    return visual_grid(model).cell


def _field(record: Any, name: str) -> Any:
    """`a.b` of a record, of a list its first element; None if there is none."""
    for part in name.split("."):
        if isinstance(record, list):
            record = record[0] if record else None
        record = record.get(part) if isinstance(record, dict) else None
    if isinstance(record, list):
        record = record[0] if record else None
    return record


def _text_of(pages: list[list[list[Placed]]]) -> str:
    """The drawn words in reading order; pieces of a broken word are joined again."""
    text, broken = "", False
    for page in pages:
        for line in page:
            for placed in line:
                text += placed.text if broken and not placed.whole else f" {placed.text}"
                broken = not placed.whole
    return text.strip()
