"""Public data sets: every record of a file becomes a checked sample or is refused with a reason.

An input is a JSON object of the data set's files by name; a file that is a text is written as it
is, anything else as JSON.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.adapt.work import Adapt
from groundkern.trainer.prepare.pipeline import Done, Step
from groundkern.trainer.prepare.sources import Item, Source
from tests.fuzz.scratch import folder, images, packed, written
from tests.fuzz.target import Target, expect, sentence


def unpacked(data: bytes, place: str) -> dict[str, Any] | None:
    """Writes the files of an input below `place`; their values by name, None for no files."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(files, dict):
        return None
    for name in NAMES:
        path = folder() / place / name
        if name not in files and path.exists():
            path.unlink()
    for name, value in files.items():
        if name not in NAMES:
            continue
        raw = value if isinstance(value, str) else json.dumps(value)
        written(f"{place}/{name}", _encoded(name, raw, value))
    return files


def _encoded(name: str, raw: str, value: Any) -> bytes:
    if name.endswith(".p"):
        return pickle.dumps(value, protocol=2)
    return raw.encode("utf-8", "surrogatepass")


NAMES = ("data.json", "instances.json", "refs(unc).p", "ocr/a.json", "Sentences/a.txt")
NAMES += ("Annotations/a.xml", "a.json", "classes.txt", "a.txt", "val_human.json")
NAMES += ("region_descriptions.json", "lines.jsonl", "annotations.xml", "annotations/a.json")
NAMES += ("box/a.csv", "key/a.json", "json/a.json")


def walk(source: Source, work: Any, root: Path) -> list[tuple[Item, Any]]:
    """Every input with what became of it, through the pipeline's own step."""
    step = Step(work, root, 1 << 20)
    done = []
    for item in source.read():
        sentence(f"{item.where}: x")
        if item.problem is not None:
            sentence(item.problem)
            done.append((item, None))
            continue
        made = step(Item(item.index, item.where, item.value))
        if not isinstance(made, Done):
            sentence(made.reason)
        done.append((item, made))
        expect(item.index == len(done) - 1, "inputs counted from 0", item.index)
    return done


def check_data_set(name: str, data: bytes, *, inside: str = "", **options: Any) -> bool:
    """A data set's files, all the way to checked samples."""
    place = f"adapt-{name}"
    files = unpacked(data, place)
    if files is None:
        return False
    path = folder() / place / inside if inside else folder() / place
    if options.get("ocr"):
        options["ocr"] = folder() / place / "ocr"
    output = folder() / place
    asked = Options(path, images=images(), output=output, folder="made", overhang=0.05, **options)
    if not path.exists():
        return False
    work = Adapt(name, asked)
    source, root = work.inputs()
    done = walk(source, work.rooted(root), root or folder() / place)
    for _, made in done:
        if isinstance(made, Done):
            _counted(made)
    wanted = COUNTS[name](files) if name in COUNTS else None
    if wanted is not None:
        expect(len(done) == wanted, f"{wanted} inputs", len(done))
    return any(isinstance(made, Done) for _, made in done)


def _counted(made: Done) -> None:
    samples = [json.loads(line) for line in made.lines]
    regions = sum(len(sample.get("regions", [])) for sample in samples)
    expect(made.counts.get("regions", regions) == regions, "regions as counted", made)
    words = sum(len(sample.get("words", [])) for sample in samples)
    expect(made.counts.get("words", words) >= words, "words as counted", made)


def _questions(files: dict) -> int | None:
    data = files.get("data.json")
    data = data.get("data") if isinstance(data, dict) else data
    return len(data) if isinstance(data, list) else None


def _captions(files: dict) -> int | None:
    text = files.get("Sentences/a.txt")
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    return sum(1 for line in text.removeprefix("\ufeff").split("\n") if line.strip()) or None


def _passages(files: dict) -> int | None:
    data = files.get("data.json")
    articles = data.get("data") if isinstance(data, dict) else data
    if not isinstance(articles, list):
        return None
    return sum(_length(article, "paragraphs", "qas") for article in articles)


def _length(record: Any, *names: str) -> int:
    """How many inputs the lists below a record make; one that has none makes one."""
    found = record.get(names[0]) if isinstance(record, dict) else None
    if not isinstance(found, list):
        return 1
    return sum(_length(each, *names[1:]) for each in found) if len(names) > 1 else len(found)


def _expressions(files: dict) -> int | None:
    refs = files.get("refs(unc).p")
    if not isinstance(refs, list):
        return None
    return sum(_length(ref, "sentences") for ref in refs)


def _descriptions(files: dict) -> int | None:
    found = files.get("region_descriptions.json")
    return sum(_length(each, "regions") for each in found) if isinstance(found, list) else None


def _charts(files: dict) -> int | None:
    found = files.get("val_human.json")
    return len(found) if isinstance(found, list) else None


def _chats(files: dict) -> int | None:
    found = files.get("data.json")
    return len(found) if isinstance(found, list) else None


COUNTS: dict[str, Callable[[dict], int | None]] = {
    "chartqa": _charts,
    "chat": _chats,
    "docvqa": _questions,
    "flickr30k": _captions,
    "refcoco": _expressions,
    "squad": _passages,
    "visual_genome": _descriptions,
}
PIXELS = base64.b64encode((images() / "turned.jpg").read_bytes()).decode()


def check_rows(name: str, data: bytes, *, root: Path | None = None, **options: Any) -> bool:
    """Rows as Hugging Face tables have them; `"image": {"base64": ...}` stands for bytes."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return False
    taken = False
    asked = Options(folder(), folder="made", root=root, **options)
    step = Step(Adapt(name, asked), folder() / "rows", 1 << 20)
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict):
            continue  # a table's rows are objects
        image = row.get("image")
        if isinstance(image, dict) and isinstance(image.get("base64"), str):
            try:
                row["image"] = {"bytes": base64.b64decode(image["base64"]), "path": None}
            except ValueError:
                row["image"] = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}
        made = step(Item(i, f"rows[{i}]", row))
        if isinstance(made, Done):
            _counted(made)
            taken = True
        else:
            sentence(made.reason)
    return taken


def _target(name: str, seeds: dict[str, bytes], share: float = 1.0, **options: Any) -> Target:
    check = partial(check_data_set, name, **options)
    return Target(name, check, seeds, "json", PIECES, share)


def _rows(name: str, *rows: dict, **options: Any) -> Target:
    seeds = {f"row {i}": json.dumps([row]).encode() for i, row in enumerate(rows)}
    check = partial(check_rows, name, **options)
    return Target(f"{name}_rows", check, seeds, "json", PIECES, 0.5)


PIECES = ("id", "image", "bbox", "label", "answers", "question", "text", "a.png", "turned.jpg")
CAPTIONS = """\
[/EN#1/people A man] in [/EN#2/clothing a black hat] sits .
Two dogs [/EN#3/animals/other run] .
"""
XML = """\
<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>
</object><object><name>2</name><name>3</name><nobndbox>1</nobndbox></object></annotation>"""
FLICKR = {"Sentences/a.txt": CAPTIONS, "Annotations/a.xml": XML}
QUESTION = {"questionId": 1, "question": "How many?", "image": "documents/a.png", "answers": ["5"]}
LINE = {"words": [{"boundingBox": [1, 2, 9, 2, 9, 5, 1, 5], "text": "coal"}]}
OCR = {"recognitionResults": [{"width": 40, "height": 30, "lines": [LINE]}]}
SIDES = {"Left": 0.1, "Top": 0.2, "Width": 0.3, "Height": 0.1}
TEXTRACT = {"WORD": [{"Text": "coal", "Geometry": {"BoundingBox": SIDES}}]}
ANSWER = {"text": "1854", "answer_start": 5}
PASSAGE = {
    "context": "Year 1854.",
    "qas": [{"id": "q", "question": "When?", "answers": [ANSWER]}],
}
REF = {"ref_id": 1, "ann_id": 2, "image_id": 3, "split": "val", "sentences": [{"sent": "a man"}]}
INSTANCES = {
    "images": [{"id": 3, "file_name": "a.png"}],
    "annotations": [{"id": 2, "image_id": 3, "bbox": [1, 2, 10, 10.5]}],
}
CORNER = {"x": 1, "y": 1, "width": 9, "height": 9}
REGION = {"region_id": 1, "image_id": 7, "phrase": "a hat", **CORNER}
POINTS = {"image": {"base64": PIXELS}, "label": "cats", "points": [{"x": 10, "y": 99.5}]}
ENTITIES = [
    {"id": 0, "text": "Name:", "label": "question", "linking": [[0, 1]], "words": []},
    {"id": 1, "text": "Ada B.", "label": "answer", "linking": [[0, 1]], "box": [1, 2, 30, 9],
     "words": [{"text": "Ada", "box": [1, 2, 9, 9]}, {"text": "B.", "box": [12, 2, 30, 9]}]},
]  # fmt: skip
QUAD = {"x1": 1, "y1": 2, "x2": 9, "y2": 2, "x3": 9, "y3": 9, "x4": 1, "y4": 9}
PRICE = {"category": "total.total_price", "group_id": 3, "words": [{"text": "9", "quad": QUAD}]}
ASKED = {"role": "user", "content": "<image>Where is <ref-object>?"}
CHATS = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nA?"},
            {"from": "gpt", "value": "B", "weight": 0},
            {"from": "gpt", "value": "C", "loss": True},
        ],
    },
    {
        "messages": [ASKED, {"role": "assistant", "content": "<bbox>"}],
        "images": ["a.png"],
        "objects": {"ref": ["it"], "bbox": [[1, 2, 9, 9.5]], "bbox_type": "real", "image_id": [0]},
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{PIXELS}"}},
                    {"type": "text", "text": "A?"},
                ],
            },
            {"role": "assistant", "content": "B"},
        ],
        "tools": "[]",
    },
    {"prompt": "A?", "completion": [{"role": "assistant", "content": "B"}], "images": [PIXELS]},
    {"query": "A?", "response": "B", "history": [["a", "b"]], "system": "C"},
    {"instruction": "A?", "input": "", "output": "B", "image": {"path": "turned.jpg"}},
    {"conversation": [{"human": "A?", "assistant": "B"}]},
]
TARGETS = (
    _target("funsd", {"one": packed(**{"annotations/a.json": {"form": ENTITIES}})}, share=0.5),
    _target("sroie", {"one": packed(**{"box/a.csv": "1,1,9,1,9,9,1,9,TOTAL 5.00\n",
        "key/a.json": {"company": "x", "date": "", "total": "5.00"}})}, share=0.5),
    _target("cord", {"one": packed(**{"json/a.json": {"valid_line": [PRICE]}})}, share=0.5),
    _target("screenspot", {"one": packed(**{"data.json": [
        {"img_filename": "a.png", "instruction": "open", "bbox": [1, 2, 9, 9]}]})},
        inside="data.json", share=0.5),
    _target("chartqa", {"human": packed(**{"val_human.json": [
        {"imgname": "a.png", "query": "What?", "label": "5"},
        {"imgname": "a.png", "query": "Which?", "label": ["a", 2.5]},
    ]})}, inside="val_human.json"),
    _target("chat", {
        "dialects": packed(**{"data.json": CHATS}),
        "lines": packed(**{"data.json": "".join(json.dumps(c) + "\n" for c in CHATS)}),
        "chosen": packed(**{"data.json": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}),
    }, inside="data.json", share=1.5, take_chosen=True),
    _target("docvqa", {
        "read": packed(**{"data.json": {"data": [QUESTION]}, "ocr/a.json": OCR}),
        "textract": packed(**{"data.json": [QUESTION], "ocr/a.json": TEXTRACT}),
    }, inside="data.json", ocr=True),
    _target("flickr30k", {"two": packed(**FLICKR)}, share=1.5),
    _target("refcoco", {"one": packed(**{"refs(unc).p": [REF], "instances.json": INSTANCES})}),
    _target("squad", {"one": packed(**{"data.json": {"data": [{"paragraphs": [PASSAGE]}]}})},
            inside="data.json"),
    _target("visual_genome", {"one": packed(**{"region_descriptions.json": [
        {"id": 7, "regions": [REGION]}]})}),
    _rows("chartqa", {"image": {"base64": PIXELS}, "query": "q", "label": ["a"], "type": "human"}),
    _rows("docvqa", {"image": {"base64": PIXELS}, "question": "q", "answers": ["a", "b"]}),
    _rows("squad", {"context": "Year 1854.", "question": "When?",
                    "answers": {"text": ["1854"], "answer_start": [5]}}),
    _rows("refcoco", {"image": {"base64": PIXELS}, "bbox": [1, 2, 9, 9], "answer": ["a", "b"]}),
    _rows("pixmo_points", POINTS, {**POINTS, "points": []}),
)  # fmt: skip
