"""DocVQA and InfographicVQA: questions about scanned pages and infographics.

On disk: `{"data": [{"questionId", "question", "image" or "image_local_name", "answers": [...]}]}`;
DocVQA's `image` is `documents/<page>.png` below the folder of the file or `--images`. The Hugging
Face sets (lmms-lab) have the same fields with the image inside. The test split has no answers. The
first answer is trained; the others, spellings of it, are `answers` for evaluation.

With `--ocr` the words of each page become `words`. DocVQA's files `<page>.json` have
`recognitionResults[0]` with `width`, `height` and words with a `boundingBox` of four corners x, y
in those units; InfographicVQA's are Amazon Textract's, `WORD[i].Geometry.BoundingBox` in
fractions of the page (Left, Top, Width, Height).

Source: docvqa.org; arXiv 2007.00398, 2104.12756; Microsoft's Read API 2.0 and Amazon Textract,
references of their results.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.prepare.adapt.common import Options, embedded, other_answers, tables
from groundkern.trainer.prepare.pipeline import LeftOut, Made
from groundkern.trainer.prepare.placing import Frame, field_of, first_there, numbers
from groundkern.trainer.prepare.reading import json_array, plain_json
from groundkern.trainer.prepare.sources import Item, Source, listed
from groundkern.trainer.records import chat_sample

PHRASING = None


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The questions of a file."""
    if (rows := tables(options)) is not None:
        if options.ocr is not None:
            raise ConfigError("adapt: --ocr goes with the original files, not with a table")
        return rows, None

    def read() -> Iterator[tuple[str, Any]]:
        for i, record in enumerate(json_array(options.data, "data")):
            yield f"{options.data.name}[{i}]", record

    return listed(read, [options.data]), options.images or options.data.parent


def convert(item: Item, options: Options) -> Made:
    """One question, its first answer and the others, and with `--ocr` the page's words."""
    row, where, pictures = item.value, item.where, {}
    question = field_of(row, "question", str, where).strip()
    answers = row.get("answers")
    if answers is None or answers == []:
        raise LeftOut(f"{where}: expected answers, got none, as in the test split")
    if not isinstance(answers, list):
        raise wrong(where, "answers", "a list", repr(answers)[:80])
    if not isinstance(answers[0], str) or not answers[0].strip():
        raise wrong(where, "answers[0]", "a text", repr(answers[0])[:80])
    task = "infographicvqa" if "image_local_name" in row or "answer_type" in row else "docvqa"
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures = found.path, found.files
    else:
        field = "image" if "image" in row else "image_local_name"
        name = field_of(row, field, str, where)
        image = first_there(options.root, [name, PurePosixPath(name).name])
    sample = chat_sample([image], question, answers[0].strip(), task=task)
    sample = other_answers(sample, answers)
    counts: dict[str, float] = {}
    if options.ocr is not None:
        words, outside = _words(options.ocr, PurePosixPath(image).stem, where, options.overhang)
        sample["words"] = words
        counts = {"words": len(words), "words_outside": outside}
    return Made([sample], pictures, counts)


def _words(folder: Path, page: str, where: str, overhang: float) -> tuple[list[dict], int]:
    """(words in fractions of the page, how many lay outside or had no area)."""
    file = folder / f"{page}.json"
    try:
        if file.stat().st_size > MAX_LINE:
            raise SampleError(f"{where}: expected at most {MAX_LINE} bytes in {file.name}")
        found = plain_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SampleError(f"{where}: expected the OCR file {file.name} ({error})") from None
    words, outside = [], 0
    for field, text, frame, values, order in _found_words(found, f"{where}: {file.name}", overhang):
        try:
            box, _ = frame.box(values, field, order=order)
        except SampleError:
            outside += 1
            continue
        if text.strip():
            sides = (frame.width, frame.height) * 2
            unit = [value / side for value, side in zip(box, sides, strict=True)]
            words.append({"text": text.strip(), "box": unit, "coord": "unit"})
    return words, outside


def _found_words(
    found: Any, where: str, overhang: float
) -> Iterator[tuple[str, str, Frame, list, str]]:
    """(field, text, frame, box, its order) of each word of either kind of file."""
    if isinstance(found, dict) and isinstance(found.get("WORD"), list):
        frame = Frame(1, 1, overhang, where)
        for i, word in enumerate(found["WORD"]):
            there = f"{where} WORD[{i}]"
            text = field_of(word, "Text", str, there)
            box = field_of(field_of(word, "Geometry", dict, there), "BoundingBox", dict, there)
            sides = ("Left", "Top", "Width", "Height")
            yield f"WORD[{i}]", text, frame, [box.get(side) for side in sides], "xywh"
        return
    pages = field_of(found, "recognitionResults", list, where)
    page = pages[0] if pages else {"width": 1, "height": 1, "lines": []}
    sides = [field_of(page, side, (float, int), where) for side in ("width", "height")]
    width, height = numbers(sides, 2, where, "width and height")
    frame = Frame(width, height, overhang, where)
    for i, line in enumerate(field_of(page, "lines", list, where)):
        for j, word in enumerate(field_of(line, "words", list, where)):
            there = f"{where} lines[{i}].words[{j}]"
            corners = field_of(word, "boundingBox", list, there)
            if len(corners) != 8 or not all(isinstance(c, int | float) for c in corners):
                raise wrong(there, "boundingBox", "8 numbers", repr(corners)[:80])
            xs, ys = corners[::2], corners[1::2]
            text = field_of(word, "text", str, there)
            yield (
                f"lines[{i}].words[{j}]",
                text,
                frame,
                [min(xs), min(ys), max(xs), max(ys)],
                "xyxy",
            )
