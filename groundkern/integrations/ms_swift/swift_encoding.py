"""What a sample of ms-swift supervises: kept while its template encodes it.

`objects` name phrases (`ref`) and boxes (`bbox`), which the template writes in its model's way for
`<ref-object>` and `<bbox>`. What it wrote is recorded, so that the answer's text is known as the
model sees it; so are the sizes of images as they were loaded, in which boxes count, and as the
processor was given them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from typing import Any

from PIL import Image
from swift.template import Template
from swift.template.vision_utils import load_image

from groundkern.integrations.shared.records import COLUMN, supervision_of
from groundkern.trainer.data.images import wrong
from groundkern.trainer.places.layouts import Part, Place, Written
from groundkern.trainer.prepare.adapt.chat.objects import Canvas, objects_of, placed
from groundkern.trainer.prepare.adapt.chat.turns import Turn

BOX_TYPES = (None, "real", "norm1")  # what ms-swift 4.6 reads; it takes all others for pixels
ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_TAGS = re.compile(r"(?:<[^<>]*>)*(.*?)(?:<[^<>]*>)*", re.DOTALL)
_NUMBERS = re.compile(r"\d.*\d|\d", re.DOTALL)
_KEEPS = "_keeps_supervision"


def keep_supervision() -> None:
    """Let all templates add `COLUMN` to what they encode for training; once."""
    for kind in _kinds(Template):
        own = kind.__dict__.get("_encode_truncated")
        if own is not None and not hasattr(own, _KEEPS):
            kind._encode_truncated = _keeping(own)


def _kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


def _keeping(own: Callable[[Template, Any], Any]) -> Callable[[Template, Any], Any]:
    """A template's method that also says what the sample supervises."""

    @wraps(own)
    def encode(template: Template, inputs: Any) -> Any:
        inner = "replace_bbox" in template.__dict__  # a subclass's method calls its parent's
        if template.mode != "train" or inner:
            return own(template, inputs)
        before = deepcopy((inputs.system, inputs.messages, inputs.objects))
        with _Recording(template).on() as seen:
            encoded = own(template, inputs)
        if not isinstance(encoded, dict):
            raise wrong("sample", "truncation_strategy", "right, left or delete", "split")
        record = _record(*before, inputs, seen)
        return encoded | {COLUMN: json.dumps(record)}

    setattr(encode, _KEEPS, True)
    return encode


class _Recording:
    """What a template loads and writes while it encodes one sample."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.sizes: list[tuple[int, int]] = []
        self.refs: list[str] = []
        self.boxes: list[str] = []

    @contextmanager
    def on(self) -> Iterator[_Recording]:
        """Within the block it is recorded."""
        template = self._template
        kept = {
            "replace_ref": self._writing(template.replace_ref, self.refs),
            "replace_bbox": self._writing(template.replace_bbox, self.boxes),
            "_load_image": self._loading(template._load_image),
        }
        template.__dict__.update(kept)
        try:
            yield self
        finally:
            for name in kept:
                del template.__dict__[name]

    def _writing(self, own: Callable[..., list[Any]], into: list[str]) -> Callable[..., list[Any]]:
        def write(value: Any, index: int, inputs: Any) -> list[Any]:
            made = own(value, index, inputs)
            texts = [x if isinstance(x, str) else self._template.tokenizer.decode(x) for x in made]
            into.append("".join(texts))
            return made

        return write

    def _loading(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def load(image: Any, load_images: bool) -> Any:
            made = own(image, load_images)
            self.sizes.append((made if isinstance(made, Image.Image) else load_image(made)).size)
            return made

        return load


class _AsWritten:
    """The writer of boxes that were written already, in their order."""

    style = "of the template"

    def __init__(self, boxes: Sequence[str]) -> None:
        self._boxes = iter(boxes)

    def write(self, places: Sequence[Place], size: tuple[int, int]) -> Written:
        text = next(self._boxes)
        numbers = _NUMBERS.search(text)
        span = (0, len(text)) if numbers is None else numbers.span()
        return Written(text, (Part(span, None),))

    def numbers(self, place: Place, size: tuple[int, int]) -> str:
        return next(self._boxes)


def _record(
    system: str | None,
    messages: list[dict[str, Any]],
    objects: dict[str, Any],
    inputs: Any,
    seen: _Recording,
) -> dict[str, Any]:
    """What `records.grounded_example` takes, and the sizes of images."""
    given = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str):  # turns are counted
            got = type(message.get("content")).__name__
            raise wrong("sample", f"messages[{i}].content", "a text", got)
    given += messages
    turns = [Turn(ROLES.get(m["role"], "tool"), (m["content"],)) for m in given]
    regions: list[dict[str, Any]] = []
    if objects and (objects.get("bbox") or objects.get("ref")):
        turns, regions = _with_objects(turns, objects, seen)
    if len(inputs.images) != len(seen.sizes):
        wanted = f"the {len(seen.sizes)} that were loaded (a template of images alone)"
        raise wrong("sample", "images", wanted, len(inputs.images))
    record = {
        "messages": [{"role": turn.role, "content": "".join(turn.pieces)} for turn in turns],
        **supervision_of(inputs.extra_kwargs),
        "sizes": seen.sizes,
        "given": [
            image.size if isinstance(image, Image.Image) else size
            for image, size in zip(inputs.images, seen.sizes, strict=True)
        ],
        "videos": len(inputs.videos) + len(inputs.audios),
    }
    if regions:
        record["regions"] = [*record.get("regions", ()), *regions]
    return record


def _with_objects(
    turns: list[Turn], objects: dict[str, Any], seen: _Recording
) -> tuple[list[Turn], list[dict[str, Any]]]:
    """Turns as the template wrote them, and the regions of boxes in answers."""
    if objects.get("bbox_type") not in BOX_TYPES:
        wanted = "real or norm1 (ms-swift reads all others as pixels)"
        raise wrong("sample", "objects.bbox_type", wanted, objects["bbox_type"])
    objects = objects_of({**objects, "ref": seen.refs}, "sample")
    canvas = Canvas(seen.sizes, 0.01, _AsWritten(seen.boxes), "sample")
    turns, regions, _ = placed(turns, objects, canvas)
    return turns, [_tied(region, "".join(turns[region["turn"]].pieces)) for region in regions]


def _tied(region: dict[str, Any], text: str) -> dict[str, Any]:
    """A region of the words alone, without the special tokens that the template puts around."""
    start, stop = region["char_span"]
    inner = _TAGS.fullmatch(text[start:stop])
    low, high = inner.span(1) if inner and inner[1].strip() else (0, stop - start)
    return {**region, "char_span": [start + low, start + high]}
