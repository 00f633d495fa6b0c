"""Flickr30k Entities: captions whose phrases are tied to boxes.

On disk: a folder with `Sentences/<image>.txt`, five captions a file with their phrases marked
`[/EN#<chain>/<type> words]`, and `Annotations/<image>.xml`, where each `object` has the chains it
belongs to as `name` and a `bndbox`, or says that it has none (`nobndbox`, `scene`). Images are
`<image>.jpg` in `--images`. `--split` names a list of images beside them, `<split>.txt`.

Boxes are Pascal VOC's: pixels counted from 1, the last one included, so that the edges are
`xmin - 1, ymin - 1, xmax, ymax`. Captions stay tokenised as they are.

Source: github.com/BryanPlummer/flickr30k_entities, README and flickr30k_entities_utils.py (which
subtracts 1); arXiv 1505.04870.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.units import extent
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.markup import plain_xml
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, size_of
from groundkern.trainer.prepare.reading import split_lines
from groundkern.trainer.prepare.sources import Item, Source, Unusable, digest, listed

PHRASING = (Phrasing("Describe this image.", "{caption}"), ("caption", "grounded"))
_PHRASE = re.compile(r"\[/EN#(\w+)((?:/\w+)+) ([^\[\]]+)\]")
_LARGEST = 1 << 22  # bytes of a caption or annotation file


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The captions of a split (default: all), each with its image's annotations."""
    sentences, annotations = (options.data / name for name in ("Sentences", "Annotations"))
    if not (sentences.is_dir() and annotations.is_dir()):
        raise ConfigError(f"{options.data}: expected the folders Sentences and Annotations")
    if options.images is None:
        raise ConfigError("adapt: flickr30k needs --images, the folder of its photographs")
    phrasing = options.phrasing(PHRASING[0])
    if len(re.findall(r"\{(?:caption|grounded)\}", phrasing.answer)) != 1:
        raise ConfigError("`--answer`: expected {caption} or {grounded} in it, once")
    if "{grounded}" in phrasing.question:
        raise ConfigError("`--question`: expected {caption} at most, got {grounded}, the answer's")
    if "{grounded}" in phrasing.answer and options.writer.rules.box is None:
        raise ConfigError(f"`--box-style`: expected one with boxes, got {options.writer.style}")
    if options.split is None:
        names = sorted(path.stem for path in sentences.glob("*.txt"))
        chosen = sentences
    else:
        chosen = options.data / f"{options.split}.txt"
        if not chosen.is_file():
            raise ConfigError(f"{chosen}: expected a list of images, which is not there")
        try:
            names = [line.strip() for line in split_lines(_text(chosen)) if line.strip()]
        except SampleError as error:
            raise ConfigError(f"{chosen}: {error}") from None

    def read() -> Iterator[tuple[str, Any]]:
        for name in names:
            file = sentences / f"{name}.txt"
            if Path(name).name != name:
                yield chosen.name, Unusable(name, f"expected the name of an image, got {name!r}")
                continue
            try:
                lines = split_lines(_text(file))
            except SampleError as error:
                yield file.name, Unusable(name, str(error))
                continue
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file.name}:{number}", (str(annotations), name, line.strip())

    source = listed(read, [chosen])
    source.identity["names"] = digest(names)
    return source, options.images


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise SampleError(f"expected at most {_LARGEST} bytes in {file.name}")
        return file.read_bytes().decode("utf-8-sig")  # not as text, whose lines end at \r too
    except OSError as error:
        raise SampleError(f"expected {file.name} to be there ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SampleError(f"expected UTF-8 in {file.name} ({error.reason})") from None


def convert(item: Item, options: Options) -> Made:
    """One caption; a phrase is a region for each of its boxes, and all phrases are `phrases`."""
    (annotations, name, line), where = item.value, item.where
    image = f"{name}.jpg"
    frame = Frame(*size_of(image, options.root, where), options.overhang, where)
    caption, phrases = _marked(line, where)
    boxes: dict[str, list[list[float]]] = {}
    counts = {"regions": 0, "boxes_cut": 0}
    annotated = _boxes(Path(annotations, f"{name}.xml"), where)
    for chain in dict.fromkeys(chain for chain, _, _ in phrases):
        for field, edges in annotated.get(chain, ()):
            box, cut = frame.box(edges, field)
            boxes.setdefault(chain, []).append(box)
            counts["boxes_cut"] += cut.get("boxes_cut", 0)
    phrasing, values = options.phrasing(PHRASING[0]), {"caption": caption}
    numbers: list[tuple[list[int], list[float]]] = []
    if "{grounded}" in phrasing.answer:
        values["grounded"], phrases, numbers = _grounded(caption, phrases, boxes, frame, options)
    record = phrasing.sample("flickr30k", image, values, [])
    shift = phrasing.filled(values)[1][0]
    tied = [([start, stop], box) for chain, start, stop in phrases for box in boxes.get(chain, ())]
    record["regions"] = [
        {"char_span": [at + shift for at in span], "box": box} for span, box in [*tied, *numbers]
    ]
    counts["regions"] = len(record["regions"])
    record["phrases"] = [{"char_span": [start + shift, stop + shift]} for _, start, stop in phrases]
    return Made([record], {}, counts)


def _grounded(
    caption: str,
    phrases: list[tuple[str, int, int]],
    boxes: dict[str, list[list[float]]],
    frame: Frame,
    options: Options,
) -> tuple[str, list[tuple[str, int, int]], list[tuple[list[int], list[float]]]]:
    """(caption with each phrase's boxes in the style, its phrases, the spans of the numbers and
    their boxes)."""
    size = (int(frame.width), int(frame.height))
    text, moved, numbers, at = "", [], [], 0
    for chain, start, stop in phrases:
        text, at, words = text + caption[at:start], stop, caption[start:stop]
        found = boxes.get(chain, ())
        here, span = len(text), (0, len(words))
        if found:
            places = [Place(extent("pixel", size, None).fractions(box), words) for box in found]
            try:
                made = options.writer.spoken(places, size)
            except ValueError as error:
                raise SampleError(f"{frame.where}: {error}") from None
            span = made.parts[0].label
            numbers += [
                ([here + part.numbers[0], here + part.numbers[1]], box)
                for part, box in zip(made.parts, found, strict=True)
            ]
        moved.append((chain, here + span[0], here + span[1]))
        text += made.text if found else words
    return text + caption[at:], moved, numbers


def _marked(line: str, where: str) -> tuple[str, list[tuple[str, int, int]]]:
    """(caption without marks, (chain, start, stop) of its phrases)."""
    caption, phrases, at = "", [], 0
    for mark in _PHRASE.finditer(line):
        caption += line[at : mark.start()]
        words = mark[3].strip()
        phrases.append((mark[1], len(caption), len(caption) + len(words)))
        caption, at = caption + words, mark.end()
    caption += line[at:]
    if "[/EN" in caption or "]" in caption:
        raise SampleError(
            f"{where}: expected marks such as [/EN#1/people A man], got {line[:80]!r}"
        )
    return caption, phrases


def _boxes(file: Path, where: str) -> dict[str, list[tuple[str, list[float]]]]:
    """(field, edges in pixels) of each chain's boxes."""
    try:
        root = plain_xml(_text(file))
    except ValueError as error:
        raise SampleError(f"{where}: {file.name}: {error}") from None
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for i, thing in enumerate(root.findall("object")):
        box = thing.find("bndbox")
        if box is None:
            continue
        field = f"{file.name} object[{i}].bndbox"
        texts = [box.findtext(side, "nothing") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = (float(text) for text in texts)
        except ValueError:
            raise wrong(where, field, "four numbers", texts) from None
        for name in thing.findall("name"):
            found.setdefault(name.text or "", []).append((field, [x0 - 1, y0 - 1, x1, y1]))
    return found
