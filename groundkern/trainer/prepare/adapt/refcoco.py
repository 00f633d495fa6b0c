"""RefCOCO, RefCOCO+, RefCOCOg: expressions that name one object of a COCO photograph.

On disk: a folder with one or more `refs(<whose split>).p`, a pickle of `{"ref_id", "ann_id",
"image_id", "split", "sentences": [{"sent"}]}`, and `instances.json` in COCO's format, whose
annotations have `bbox`. The pickle is read without letting it import or call anything. The images
are COCO's `train2014`, in `--images`. Hugging Face rows (lmms-lab) have `image`, `bbox` and the
expressions in `answer`.

Boxes are `[x, y, width, height]` in pixels from the top left corner, as everywhere in COCO; some
exceed their image by a rounding error.

Source: github.com/lichengunc/refer, README and refer.py; cocodataset.org, format of annotations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import wrong
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, size_of
from groundkern.trainer.prepare.reading import Table, json_array, plain_pickle
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = (Phrasing("Where is {label}?", "{box}"), ("label", "box", "point"))


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The expressions of a split (default: all), each with its box."""
    if (rows := tables(options)) is not None:
        return rows, None
    pickles = [options.data] if options.data.is_file() else sorted(options.data.glob("refs(*).p"))
    if len(pickles) != 1:
        found = ", ".join(path.name for path in pickles) or "none"
        raise ConfigError(f"{options.data}: expected one refs(...).p, got {found}; name the file")
    instances = pickles[0].parent / "instances.json"
    if options.images is None:
        raise ConfigError("adapt: refcoco needs --images, COCO's folder train2014")
    refs = plain_pickle(pickles[0])
    if not isinstance(refs, list):
        raise ConfigError(f"{pickles[0]}: expected a list of references")
    splits = {str(ref.get("split")) for ref in refs if isinstance(ref, dict)}
    if options.split is not None and options.split not in splits:
        known = ", ".join(sorted(splits))
        raise ConfigError(f"{pickles[0]}: expected --split, one of {known}, got {options.split}")

    def read() -> Iterator[tuple[str, Any]]:
        boxes, names = Table(), Table()
        for record in json_array(instances, "annotations"):
            if isinstance(record, dict):
                boxes.add(record.get("id"), [record.get("image_id"), record.get("bbox")])
        for record in json_array(instances, "images"):
            if isinstance(record, dict):
                names.add(record.get("id"), record.get("file_name"))
        for i, ref in enumerate(refs):
            split = ref.get("split") if isinstance(ref, dict) else options.split
            if options.split in (None, split):
                yield from _expressions(ref, f"{pickles[0].name}[{i}]", boxes, names)

    return listed(read, [pickles[0], instances]), options.images


def _expressions(ref: Any, where: str, boxes: Table, names: Table) -> Iterator[tuple[str, Any]]:
    sentences = ref.get("sentences") if isinstance(ref, dict) else None
    if not isinstance(sentences, list):
        yield where, _unusable(ref, "`sentences`: expected a list of a reference, got none")
        return
    ids = {name: ref.get(name) for name in ("ann_id", "image_id")}
    whole = {name: value for name, value in ids.items() if type(value) is int}
    box, name = boxes.get(whole.get("ann_id")), names.get(whole.get("image_id"))
    for j, sentence in enumerate(sentences):
        there = f"{where}.sentences[{j}]"
        label = sentence.get("sent") if isinstance(sentence, dict) else None
        if not box or not name:
            what = "image_id" if box else "ann_id"
            reason = f"`{what}`: expected one of instances.json, got {ids[what]!r}"
            yield there, _unusable({**ref, "sentences": [sentence]}, reason)
        elif box[0][0] != ids["image_id"]:
            reason = f"`image_id`: expected {box[0][0]!r}, the annotation's, got {ids['image_id']}"
            yield there, _unusable({**ref, "sentences": [sentence]}, reason)
        else:
            yield there, {"label": label, "bbox": box[0][1], "image": name[0]}


def _unusable(original: Any, reason: str) -> Unusable:
    """What a pickle held, in a form that JSON has."""
    try:
        return Unusable(json.loads(json.dumps(original, default=str)), reason)
    except (TypeError, ValueError, RecursionError):
        return Unusable(repr(original)[:10_000], reason)


def convert(item: Item, options: Options) -> Made:
    """One sample for each expression; its region is the box."""
    row, where, pictures = item.value, item.where, {}
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures, size = found.path, found.files, found.size
        labels = row.get("answer")
        labels = labels if isinstance(labels, list) else [labels]
    else:
        image = field_of(row, "image", str, where)
        labels = [row.get("label")]
        size = size_of(image, options.root, where)
    box, counts = Frame(*size, options.overhang, where).box(row.get("bbox"), "bbox", order="xywh")
    samples = []
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise wrong(where, "sentence", "a text", repr(label)[:80])
        sample = options.phrasing(PHRASING[0]).sample(
            "refcoco",
            image,
            {"label": label.strip()},
            [{"box": box}],
            size=size,
            writer=options.writer,
            where=where,
        )
        samples.append(sample)
    return Made(samples, pictures, {"regions": len(samples), **counts})
