"""A sample as `GroundingCollator` hands it to the model: visual tokens, labels, aligned tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from groundkern.hf.data.collator import GroundingCollator  # not by way of hf: no Trainer here
from groundkern.hf.data.example import GroundedExample
from groundkern.trainer.inspection.sheets import Cell
from groundkern.trainer.inspection.views import View, framed
from groundkern.trainer.prepare.grid import visual_grid
from groundkern.trainer.visual_places import VisualPlaces, visual_places

if TYPE_CHECKING:
    from groundkern.trainer.data.dataset import JsonLinesDataset

LOST = {
    "regions_outside": "regions on no visual token",
    "side_rows_without_region": "aligned tokens without a visible region",
    "side_rows_on_image": "aligned tokens right behind an image",
    "map_rows_on_image": "answers right behind an image",
    "words_dropped_blank": "words without a token",
    "words_dropped_punctuation": "words without a letter or digit",
    "words_dropped_special": "words that are a special token",
    "words_dropped_unknown": "words that the tokenizer does not know",
    "words_dropped_fragment": "words that begin with a part of a character",
    "words_dropped_number": "words that are numbers",
    "words_dropped_long": "words of too many tokens",
    "words_dropped_tall": "words too tall",
    "words_dropped_outside": "words on no visual token",
    "words_shared_token": "words on a visual token with another",
    "words_useless_blank": "words whose label is a blank",
    "words_useless_fragment": "words whose label is a part of a character",
    "words_useless_punctuation": "words whose label is punctuation",
    "words_useless_digit": "words whose label is one digit of a longer number",
}


class SeenByModel:
    """Collates one sample at a time with the settings that training starts from.

    Args:
        path: model folder with config.json, processor and tokenizer.

    Attributes:
        labels: how many visual tokens of the samples seen have each label, or set of labels.

    Raises:
        ConfigError: they cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        grid = visual_grid(path)
        self.processor, self.config = _without_pixels(grid.processor), grid.config
        self.cell = grid.cell
        self._collator = GroundingCollator(self.processor, self.config)
        self.labels: Counter[tuple[int, ...]] = Counter()

    def make_wrong(self, control: str, dataset: JsonLinesDataset, seed: int) -> None:
        """Show what a run with a control trains on.

        Args:
            control: of SMAM and KLAL.
            dataset: its samples.
            seed: the run's.
        """
        from groundkern.trainer.controls import pool_of

        self._collator = GroundingCollator(
            self.processor,
            self.config,
            side_control=control,
            map_control=control,
            control_pool=pool_of(dataset) if control == "shuffled" else None,
            control_seed=seed,
        )

    def shown(self, example: GroundedExample) -> GroundedExample:
        """The example with the regions that it is trained on, as they are drawn."""
        return self._collator.controls.applied(example, self._collator.side_control)

    @property
    def counts(self) -> Counter:
        """Supervision found and lost in the samples seen."""
        return self._collator.counts

    def see(self, example: GroundedExample) -> Seen:
        """Raises `ValueError` for a sample that does not fit the model."""
        before = Counter(self.counts)
        batch = self._collator([example])
        places = visual_places(self._collator, example, batch)
        seen = Seen(self, example, batch, places, self.counts - before)
        self.labels.update(seen.labels.values())
        return seen

    def text(self, token: int) -> str:
        """What a token shows."""
        return self.processor.tokenizer.decode([token])


class Seen:
    """One sample, seen.

    Attributes:
        labels: the label, or labels, of each visual token that has one.
        tokens: (text, kind, title) of each trained token; kind "aligned" if a region supervises it,
            "map" if the row that predicts it has a target map.
        warnings: what of the supervision is lost, in words.
    """

    def __init__(
        self,
        model: SeenByModel,
        example: GroundedExample,
        batch: dict[str, Tensor],
        places: VisualPlaces,
        counts: Counter,
    ) -> None:
        self._model, self._example, self._places = model, example, places
        self._columns = batch["gk_map_columns"][0].tolist()
        self._inside = batch["gk_side_inside"][0].any(0)[self._columns]  # [n]
        rows = ("word_position", "word_label", "several_label")
        self.labels: dict[int, tuple[int, ...]] = {
            self._columns.index(position): tuple(x for x in several if x >= 0) or (label,)
            for position, label, several in zip(*(batch[f"gk_{x}"][0].tolist() for x in rows))
            if position >= 0
        }
        self.tokens = self._tokens(batch)
        self.warnings = [f"{why}: {counts[name]:,}" for name, why in LOST.items() if counts[name]]

    def view(self, index: int) -> View:
        """Image `index` as the processor frames and resizes it, with its visual tokens."""
        own = self._places.of(index).nonzero()[:, 0].tolist()
        whole = self._example.images[index].size
        if not own:
            return framed(whole, caption="no visual token")
        rects = self._places.rects[own]
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
        self._draw(view, view, own)
        return view

    def draw_video(self, view: View, number: int, cells: Sequence[Cell]) -> None:
        """Draw the visual tokens of a video on each frame that they show."""
        for cell in cells:
            own = self._places.of(len(self._example.images) + number, cell.time)
            self._draw(view, cell, own.nonzero()[:, 0].tolist())

    def _draw(self, view: View, canvas: View | Cell, own: list[int]) -> None:
        rects = self._places.rects[own].tolist()
        places = {n: canvas.box(tuple(rect)) for n, rect in zip(own, rects)}
        view.grid += places.values()
        view.inside += [box for n, box in places.items() if self._inside[n]]
        view.labels += [
            (box, " | ".join(map(self._model.text, self.labels[n])))
            for n, box in places.items()
            if n in self.labels
        ]

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
            found.append((self._model.text(label), kind, title))
        return found


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
