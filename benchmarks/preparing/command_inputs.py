"""Inputs of `benchmarks.preparing.commands`: drawn images, and annotations of them in many formats.

Each function writes what a command reads for `count` samples and returns the command's words. All
images are told apart by their number, so that nothing is found in a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (320, 240)
BOX = (40, 60, 200, 180)  # of the thing in each image
WORDS = ("Total", "amount", "12.50", "paid", "by", "card", "on", "Monday")


def words(folder: Path, count: int) -> list[str]:
    """Pages of one line, read by tesseract as they are."""
    pages = folder / "pages"
    pages.mkdir()
    font = ImageFont.load_default(24)
    for number in range(count):
        page = Image.new("L", (420, 60), 255)
        ImageDraw.Draw(page).text((10, 15), f"Invoice {number} of the year", 0, font)
        page.save(pages / f"{number:06d}.png")
    options = ["--engine", "tesseract", "--page-mode", "6", "--scale", "1", "--no-rotation"]
    return ["prepare", "words", str(pages), *options]


def render(folder: Path, count: int) -> list[str]:
    """Texts of a few lines."""
    texts = ({"text": f"Passage {number}: " + " ".join(WORDS * 3)} for number in range(count))
    return ["prepare", "render", _lines(folder, texts)]


def marks(folder: Path, count: int) -> list[str]:
    """Samples with words of their own."""
    return ["prepare", "marks", _lines(folder, _samples(folder, count))]


def phrases(folder: Path, count: int) -> list[str]:
    """The same samples."""
    return ["prepare", "phrases", _lines(folder, _samples(folder, count)), "--by", "rules"]


def drawn(_: Path, count: int) -> list[str]:
    """Drawings of a grid."""
    return ["prepare", "maps", "--task", "grid_patch", "--count", str(count)]


def coco(folder: Path, count: int) -> list[str]:
    """One file, a box an image."""
    x0, y0, x1, y1 = BOX
    names = list(_images(folder, count))
    file = folder / "coco.json"
    content = {
        "images": [
            {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i in range(count)
        ],
    }
    file.write_text(json.dumps(content))
    return _maps(file, "coco", folder)


def yolo(folder: Path, count: int) -> list[str]:
    """A text file an image."""
    labels = folder / "labels"
    labels.mkdir()
    (folder / "classes.txt").write_text("thing\n")
    for name in _images(folder, count):
        (labels / name).with_suffix(".txt").write_text("0 0.375 0.5 0.5 0.5\n")
    return ["prepare", "maps", str(labels), "--format", "yolo"]


def voc(folder: Path, count: int) -> list[str]:
    """An XML file an image."""
    sides = zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    for name in _images(folder, count, "JPEGImages"):
        file = (folder / "Annotations" / name).with_suffix(".xml")
        file.parent.mkdir(exist_ok=True)
        thing = f"<object><name>thing</name><bndbox>{box}</bndbox></object>"
        file.write_text(f"<annotation><filename>{name}</filename>{thing}</annotation>")
    return ["prepare", "maps", str(folder), "--format", "voc"]


def cvat(folder: Path, count: int) -> list[str]:
    """One XML file, a box an image."""
    width, height = SIZE
    sides = zip(("xtl", "ytl", "xbr", "ybr"), BOX, strict=True)
    box = " ".join(f'{side}="{value}"' for side, value in sides)
    file = folder / "cvat.xml"
    with file.open("w") as out:
        out.write("<annotations>\n")
        for number, name in enumerate(_images(folder, count)):
            out.write(f'<image id="{number}" name="{name}" width="{width}" height="{height}">')
            out.write(f'<box label="thing" {box}/></image>\n')
        out.write("</annotations>\n")
    return _maps(file, "cvat", folder)


def labelstudio(folder: Path, count: int) -> list[str]:
    """One export, a task an image."""
    value = {"x": 12.5, "y": 25, "width": 50, "height": 50, "rectanglelabels": ["thing"]}
    size = dict(zip(("original_width", "original_height"), SIZE, strict=True))
    result = {**size, "type": "rectanglelabels", "value": value}
    tasks = (
        {"data": {"image": f"/data/upload/{name}"}, "annotations": [{"result": [result]}]}
        for name in _images(folder, count)
    )
    return _maps(_array(folder, tasks), "labelstudio", folder)


def labelme(folder: Path, count: int) -> list[str]:
    """A JSON file an image."""
    shape = {"label": "thing", "shape_type": "rectangle", "points": [BOX[:2], BOX[2:]]}
    for name in _images(folder, count):
        content = {"imagePath": name, "imageData": None, "shapes": [shape]}
        (folder / "images" / name).with_suffix(".json").write_text(json.dumps(content))
    return ["prepare", "maps", str(folder / "images"), "--format", "labelme"]


def chat(folder: Path, count: int) -> list[str]:
    """LLaVA's conversations, whose answers write a box."""
    x0, y0, x1, y1 = BOX
    box = f"[{x0}, {y0}, {x1}, {y1}]"
    said = f'```json\n[{{"bbox_2d": {box}, "label": "thing"}}]\n```'
    talk = [
        {"from": "human", "value": "<image>\nWhere is the thing?"},
        {"from": "gpt", "value": said},
    ]
    records = (
        {"id": number, "image": f"images/{name}", "conversations": talk}
        for number, name in enumerate(_images(folder, count))
    )
    return ["prepare", "adapt", "chat", str(_array(folder, records)), "--coord", "pixel"]


def squad(folder: Path, count: int) -> list[str]:
    """Passages of one question each."""
    passage = " ".join(WORDS * 12)
    answers = [{"text": "12.50", "answer_start": passage.index("12.50")}]
    articles = (
        {
            "paragraphs": [
                {
                    "context": passage,
                    "qas": [{"id": str(number), "question": "How much?", "answers": answers}],
                }
            ]
        }
        for number in range(count)
    )
    file = folder / "squad.json"
    file.write_text(f'{{"data": {_array(folder, articles).read_text()}}}')
    return ["prepare", "adapt", "squad", str(file)]


def funsd(folder: Path, count: int) -> list[str]:
    """Forms of one question each."""
    top = folder / "training_data"
    entities = [
        {"id": i, "label": label, "text": text, "box": BOX, "linking": [[0, 1]], "words": []}
        for i, (label, text) in enumerate((("question", "Name"), ("answer", "Ada Lovelace")))
    ]
    for entity in entities:
        entity["words"] = [{"text": text, "box": BOX} for text in entity["text"].split()]
    for name in _images(top, count):
        file = (top / "annotations" / name).with_suffix(".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"form": entities}))
    return ["prepare", "adapt", "funsd", str(folder)]


def sroie(folder: Path, count: int) -> list[str]:
    """Receipts of one value each."""
    x0, y0, x1, y1 = BOX
    (folder / "box").mkdir()
    (folder / "key").mkdir()
    for name in _images(folder, count, "img"):
        line = f"{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1},SOME SHOP\n"
        (folder / "box" / name).with_suffix(".csv").write_text(line)
        key = (folder / "key" / name).with_suffix(".json")
        key.write_text(json.dumps({"company": "SOME SHOP"}))
    return ["prepare", "adapt", "sroie", str(folder)]


def inspect(folder: Path, count: int) -> list[str]:
    """Samples with words, of which the first 24 are shown."""
    return ["inspect", _lines(folder, _samples(folder, count))]


def inspect_all(folder: Path, count: int) -> list[str]:
    """The same, all of them shown."""
    return [*inspect(folder, count), "--samples", str(count)]


def _maps(file: Path, form: str, folder: Path) -> list[str]:
    return ["prepare", "maps", str(file), "--format", form, "--images", str(folder / "images")]


def _samples(folder: Path, count: int) -> Iterator[dict]:
    """Samples whose answer stands in the image, as their words say."""
    texts = WORDS * 4
    boxes = ([10 + 38 * (i % 8), 20 + 50 * (i // 8)] for i in range(len(texts)))
    placed = [
        {"text": text, "box": [x, y, x + 36, y + 12]}
        for text, (x, y) in zip(texts, boxes, strict=True)
    ]
    placed[10] = {**placed[10], "text": "14.75"}
    messages = [
        {"role": "user", "content": "How much was paid?"},
        {"role": "assistant", "content": "The old man paid 14.75 by card on a sunny Monday."},
    ]
    for name in _images(folder, count):
        yield {"images": [f"images/{name}"], "messages": messages, "words": placed}


def _images(folder: Path, count: int, within: str = "images") -> Iterator[str]:
    """Names of images in a folder, written one after another."""
    place = folder / within
    place.mkdir(parents=True)
    for number in range(count):
        picture = Image.new("RGB", SIZE, "white")
        draw = ImageDraw.Draw(picture)
        draw.rectangle(BOX, (number % 256, number // 256 % 256, 100))
        draw.text((5, 5), str(number), "black")
        name = f"{number:06d}.jpg"
        picture.save(place / name)
        yield name


def _lines(folder: Path, records: Iterable[dict]) -> str:
    file = folder / "input.jsonl"
    with file.open("w") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)
    return str(file)


def _array(folder: Path, records: Iterable[dict]) -> Path:
    file = folder / "input.json"
    with file.open("w") as out:
        out.write("[")
        for number, record in enumerate(records):
            out.write((",\n" if number else "\n") + json.dumps(record))
        out.write("\n]\n")
    return file
