"""CORD: receipts with the meaning of each printed value.

On disk: a folder of splits (`--split train`, `dev`, `test`), each with `json/<receipt>.json` and
`image/<receipt>.png`; on the hub rows of `image` and `ground_truth`, the same JSON as a text. A
receipt has `valid_line`s of `category`, `group_id` and `words`, each of `text`, `is_key` and a
`quad` of four corners in pixels.

A line's value is its words that are no key. Those of a menu item ask by its printed name, which
must be there once; those of totals ask by what they are. The regions are the quads of the words;
all words are `words`.

Source: github.com/clovaai/cord; huggingface.co/datasets/naver-clova-ix/cord-v2.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.namesakes import Images, Where
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, numbers, size_of
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed
from groundkern.trainer.records import chat_sample

PHRASING = (Phrasing("What is the {field}?", "{answer}"), ("field", "answer"))
ITEM = {
    "price": "price",
    "unitprice": "unit price",
    "cnt": "count",
    "num": "number",
    "discountprice": "discount",
    "itemsubtotal": "price after discount",
}
TOTALS = {
    "sub_total.subtotal_price": "subtotal",
    "sub_total.discount_price": "discount",
    "sub_total.service_price": "service charge",
    "sub_total.othersvc_price": "other charge",
    "sub_total.tax_price": "tax",
    "total.total_price": "total",
    "total.cashprice": "cash paid",
    "total.changeprice": "change",
    "total.creditcardprice": "amount paid by card",
    "total.emoneyprice": "amount paid by electronic money",
    "total.menutype_cnt": "number of kinds of items",
    "total.menuqty_cnt": "number of items",
}


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The receipts."""
    if (rows := tables(options)) is not None:
        return rows, None
    top = options.data if options.split is None else options.data / options.split
    files = sorted(top.rglob("json/*.json"))
    if not files:
        raise ConfigError(f"{top}: expected CORD's json/*.json, or a Hugging Face data set")
    root = options.images or options.data

    def read() -> Iterator[tuple[str, Any]]:
        images = Images(root, lambda: (_where(file, root) for file in files))
        for file in files:
            name = os.path.relpath(file, options.data)
            try:
                if file.stat().st_size > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE} bytes")
                found = plain_json(file.read_bytes())
            except (OSError, ValueError) as error:
                yield name, Unusable(name, f"expected a receipt's JSON ({error})")
                continue
            image = images.find(_where(file, root))
            yield name, {"receipt": found, "path": image}

    return listed(read, files), root


def _where(file: Path, root: Path) -> Where:
    """Where a receipt's image lies beside its JSON, and by its name alone."""
    beside = os.path.relpath(file.parent.parent / "image" / file.stem, root)
    places, by_name = ([stem + end for end in (".png", ".jpg")] for stem in (beside, file.stem))
    return Where(str(file), places, by_name)


def convert(item: Item, options: Options) -> Made:
    """One receipt: a sample for each value that has a question."""
    row, where, pictures = item.value, item.where, {}
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures, size = found.path, found.files, found.size
        try:
            receipt = plain_json(field_of(row, "ground_truth", str, where))
        except SampleError:
            raise
        except ValueError as error:
            raise wrong(where, "ground_truth", "the JSON of a receipt", str(error)) from None
    else:
        receipt, image = row["receipt"], row["path"]
        size = size_of(image, options.root, where)
    frame = Frame(*size, options.overhang, where)
    lines = [_line(line) for line in field_of(receipt, "valid_line", list, where)]
    counts: Counter[str] = Counter(regions=0, words=0, words_outside=0)
    words = []
    for word in (word for line in lines for word in line["all"]):
        try:
            box, _ = frame.box(_around(_quad(word, where)), "quad")
        except SampleError:
            counts["words_outside"] += 1
        else:
            words.append({"text": word["text"].strip(), "box": box})
    samples = []
    for field, line in _asked(lines, counts):
        try:
            samples.append(_sample(field, line, image, frame, options))
        except SampleError:
            counts["passed over: values outside of their image"] += 1
            continue
        samples[-1]["words"] = words
        counts["regions"] += len(samples[-1]["regions"])
        counts["words"] += len(words)
    return Made(samples, pictures, counts)


def _line(line: Any) -> dict[str, Any]:
    """A line's category, group and words that have a text; those of its value apart."""
    found = line if isinstance(line, dict) else {}
    words = found.get("words")
    words = [
        word
        for word in (words if isinstance(words, list) else ())
        if isinstance(word, dict) and isinstance(word.get("text"), str) and word["text"].strip()
    ]
    value = [word for word in words if word.get("is_key") not in (1, True)]
    text = " ".join(word["text"].strip() for word in value)
    category = str(found.get("category")).replace("subtotal.", "sub_total.", 1)
    return {
        "category": category,
        "group": str(found.get("group_id")),
        "all": words,
        "value": value,
        "text": text,
    }


def _asked(lines: list[dict], counts: Counter[str]) -> Iterator[tuple[str, dict]]:
    """(what is asked for, line) of the values that a question can name; counts the others."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if line["category"] == "menu.nm":
            names.setdefault(line["group"], []).append(line["text"])
    printed = Counter(" ".join(found) for found in names.values())
    times = Counter((line["category"], line["group"]) for line in lines)
    totals = Counter(line["category"] for line in lines)
    for line in lines:
        whole, (top, _, part) = line["category"], line["category"].partition(".")
        name = " ".join(names.get(line["group"], []))
        several = (times[whole, line["group"]] if top == "menu" else totals[whole]) > 1
        if whole == "menu.nm":
            continue  # asked by, not for
        if not line["text"]:
            counts["passed over: lines without a value"] += 1
        elif whole not in TOTALS and (top != "menu" or part not in ITEM):
            counts[f"passed over: lines of {whole[:40]}"] += 1
        elif several:
            counts["passed over: values of several lines"] += 1
        elif whole in TOTALS:
            yield TOTALS[whole], line
        elif not name or printed[name] > 1:
            counts["passed over: values of items whose name is not there once"] += 1
        else:
            yield f'{ITEM[part]} of "{name}"', line


def _sample(field: str, line: dict, image: str, frame: Frame, options: Options) -> dict[str, Any]:
    """The sample of a value; each of its words is a region of its own."""
    phrasing = options.phrasing(PHRASING[0])
    values = {"field": field, "answer": line["text"]}
    said, span = phrasing.filled(values)
    tied = said[slice(*span)] == line["text"]
    regions, at = [], span[0]
    for word in line["value"]:
        text = word["text"].strip()
        corners = [frame.point(p, "quad")[0] for p in _quad(word, frame.where)]
        there = [at, at + len(text)] if tied else list(span)
        regions.append({"char_span": there, "polygon": corners})
        at += len(text) + 1
    question = phrasing.question.format_map(values)
    return chat_sample([image], question, said, task="cord", regions=regions)


def _quad(word: dict, where: str) -> list[list[float]]:
    """The four corners of a word."""
    quad = field_of(word, "quad", dict, where)
    return [numbers([quad.get(f"x{i}"), quad.get(f"y{i}")], 2, where, "quad") for i in range(1, 5)]


def _around(corners: list[list[float]]) -> list[float]:
    xs, ys = zip(*corners, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]
