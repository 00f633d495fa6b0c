"""A sample as `GroundingCollator` hands it to the model: visual tokens, labels, aligned tokens."""

from __future__ import annotations

from collections import Counter
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from groundkern.hf.data.collator import GroundingCollator  # not by way of hf: no Trainer here
from groundkern.hf.data.example import GroundedExample
from trainer.inspection.views import View, framed
from trainer.prepare.grid import visual_grid

LOST = {
    "regions_outside": "regions on no visual token",
    "side_rows_without_region": "aligned tokens without a visible region",
    "side_rows_on_image": "aligned tokens right behind an image",
    "map_rows_on_image": "answers right behind an image",
    "words_dropped_blank": "words without a token",
    "words_dropped_special": "words that are a special token",
    "words_dropped_fragment": "words that begin with a part of a character",
    "words_dropped_long": "words of too many tokens",
    "words_dropped_tall": "words too tall",
    "words_dropped_outside": "words on no visual token",
    "words_shared_token": "words on a visual token with another",
}


class SeenByModel:
    """Collates one sample at a time with the settings that training starts from.

    Args:
        path: model folder with config.json, processor and tokenizer.

    Raises:
        ConfigError: they cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        grid = visual_grid(path)
        self.processor, self.config = _without_pixels(grid.processor), grid.config
        self.cell = grid.cell
        self._collator = GroundingCollator(self.processor, self.config)

    @property
    def counts(self) -> Counter:
        """Supervision found and lost in the samples seen."""
        return self._collator.counts

    def see(self, example: GroundedExample) -> Seen:
        """Raises `ValueError` for a sample that does not fit the model."""
        before = Counter(self.counts)
        batch = self._collator([example])
        (table,) = self._collator.geometry([example.images], batch)
        return Seen(self, example, batch, table, self.counts - before)


class Seen:
    """One sample, seen.

    Attributes:
        tokens: (text, kind, title) of each trained token; kind "aligned" if a region supervises it,
            "map" if the row that predicts it has a target map.
        warnings: what of the supervision is lost, in words.
    """

    def __init__(
        self,
        model: SeenByModel,
        example: GroundedExample,
        batch: dict[str, Tensor],
        table: Tensor,
        counts: Counter,
    ) -> None:
        self._model, self._example, self._table = model, example, table
        self._columns = batch["gk_map_columns"][0].tolist()
        self._inside = batch["gk_side_inside"][0].any(0)[self._columns]  # [n]
        self._labels = {
            self._columns.index(position): label
            for position, label in zip(
                batch["gk_word_position"][0].tolist(), batch["gk_word_label"][0].tolist()
            )
            if position >= 0
        }
        self.tokens = self._tokens(batch)
        self.warnings = [f"{why}: {counts[name]:,}" for name, why in LOST.items() if counts[name]]

    def view(self, index: int) -> View:
        """Image `index` as the processor frames and resizes it, with its visual tokens."""
        own = [
            n
            for n, (image, x0, _, x1, _) in enumerate(self._table.tolist())
            if image == index and x0 < x1
        ]
        whole = self._example.images[index].size
        if not own:
            return framed(whole, caption="no visual token")
        rects = self._table[own, 1:]
        frame = (*rects[:, :2].amin(0).tolist(), *rects[:, 2:].amax(0).tolist())
        steps = (rects[:, 2:] - rects[:, :2]).amin(0)
        sides = torch.tensor([frame[2] - frame[0], frame[3] - frame[1]], dtype=torch.float64)
        columns, rows = (sides / steps).round().long().tolist()
        size = (columns * self._model.cell, rows * self._model.cell)
        caption = (
            f"{whole[0]} x {whole[1]} pixels, seen as {size[0]} x {size[1]}: "
            f"{columns} x {rows} visual tokens"
        )
        view = framed(whole, frame, size, caption)
        places = {n: view.box(tuple(rect)) for n, rect in zip(own, rects.tolist())}
        view.grid = list(places.values())
        view.inside = [box for n, box in places.items() if self._inside[n]]
        view.labels = [
            (box, self._text(self._labels[n])) for n, box in places.items() if n in self._labels
        ]
        return view

    def _tokens(self, batch: dict[str, Tensor]) -> list[tuple[str, str, str]]:
        rows = zip(batch["gk_side_position"][0].tolist(), batch["gk_side_set"][0].tolist())
        sets = {position + 1: number for position, number in rows if position >= 0}
        targets = {token for token in batch["gk_map_token_position"][0].tolist() if token >= 0}
        found = []
        for position, label in enumerate(batch["labels"][0].tolist()):
            if label < 0:
                continue
            title = f"token {position}, id {label}"
            kind = "map" if position in targets else ""
            if position in sets:
                covered = int(batch["gk_side_inside"][0, sets[position]].sum())
                kind, title = f"aligned {kind}", f"{title}: region of {covered} visual tokens"
            if position in targets:
                title += "; the row that predicts it has the target map"
            found.append((self._text(label), kind, title))
        return found

    def _text(self, token: int) -> str:
        return self._model.processor.tokenizer.decode([token])


def _without_pixels(processor: Any) -> Any:
    """The processor with the same tokens of the same places, whose pixels are cheap and wrong.

    Nothing that is shown comes from its pixels, and resampling them well takes half of the time.
    """
    processor, images = copy(processor), copy(processor.image_processor)
    cheap = {"resample": Image.Resampling.NEAREST, "do_rescale": False, "do_normalize": False}
    for name, value in cheap.items():
        if hasattr(images, name):
            setattr(images, name, value)
    processor.image_processor = images
    return processor
