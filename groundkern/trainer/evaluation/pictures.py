"""A failure as pictures: the images with what is right and what was answered, and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from groundkern.rasters import Raster
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.evaluation.scoring import Marks, Scoring
from groundkern.trainer.heatmaps import heat_maps
from groundkern.trainer.inspection.sheets import sheet_of
from groundkern.trainer.outlines import outlines
from groundkern.trainer.pictures import close_up, full_scale, heat_picture, outline, page_uri, whole

_ANSWERED = (232, 89, 12)
_REACH = 4.0  # of the image's sides: how far off a box is still drawn


class Picture(NamedTuple):
    """An image for a page: a data URI, and what stands below it."""

    uri: str
    caption: str


class Pictures:
    """Draws samples.

    Args:
        dataset: the samples.
        scoring: knows what is right of each, and where an answer points to.
        grounding: of `Grounding`, for heat maps, or None.
    """

    def __init__(self, dataset: JsonLinesDataset, scoring: Scoring, grounding: Any) -> None:
        self._dataset, self._scoring, self._grounding = dataset, scoring, grounding

    def of(self, row: dict[str, Any]) -> list[Picture]:
        """The images and videos of a sample, then the heat maps over the one that has a region."""
        sample = self._dataset.sample(row["sample"])
        try:
            example = sample.load()
        except SampleError as error:  # it went away since
            return [Picture("", str(error))]
        found = []
        for at, image in enumerate(example.images):
            shown = whole(image)
            marks = self._scoring.marks(row) if at == 0 else None
            caption = f"image {at + 1}" if len(example.images) > 1 else ""
            if marks is not None:
                outline(shown, _entry(marks.right))
                _mark(shown, marks.answered)
            found.append(Picture(page_uri(shown), caption))
        for number, video in enumerate(example.videos):
            view, _, sheet = sheet_of(video, number)
            found.append(Picture(page_uri(sheet), view.caption))
        return found + self._heat(row["sample"])

    def _heat(self, index: int) -> list[Picture]:
        if self._grounding is None or not self._dataset.counts["regions"][index]:
            return []
        collator, model = self._grounding.collator, self._grounding.model
        entries = heat_maps(model, collator, {"": [index]}, self._dataset, limit=1)
        found = []
        for entry in entries:
            for kind in ("attention", "contribution"):
                if kind in entry:
                    values, top = entry[kind], full_scale([entry[kind]])
                    title = f"{kind}, 0 to {top:.2g}"
                    found.append(Picture(heat_picture(entry, values, top), title))
                    if close := close_up(entry, values, top):
                        found.append(Picture(close, f"{title}, around the region"))
        return found


def _entry(marks: Marks) -> dict[str, Sequence]:
    masks = [Raster(torch.from_numpy(mask)) for mask in marks.masks]
    return {
        "boxes": marks.boxes,
        "points": marks.points,
        "polygons": marks.polygons,
        "polylines": [line for raster in masks for line in outlines(raster)],
    }


def _mark(image: Image.Image, marks: Marks) -> None:
    """Draws what was answered, if it is anywhere near the image."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for x0, y0, x1, y1 in marks.boxes:
        if all(-_REACH < value < _REACH for value in (x0, y0, x1, y1)):
            corners = [x0 * width, y0 * height, x1 * width, y1 * height]
            draw.rectangle(corners, outline=_ANSWERED, width=3)
    for x, y in marks.points:
        if -_REACH < x < _REACH and -_REACH < y < _REACH:
            x, y = x * width, y * height
            draw.line([x - 9, y - 9, x + 9, y + 9], fill=_ANSWERED, width=4)
            draw.line([x - 9, y + 9, x + 9, y - 9], fill=_ANSWERED, width=4)
