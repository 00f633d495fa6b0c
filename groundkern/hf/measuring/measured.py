"""`MeasuredGeometry`: the places of visual tokens of a model whose family has no table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from groundkern.checks import fail
from groundkern.hf.data.geometry.views import Size
from groundkern.hf.data.image_token import image_token_id
from groundkern.hf.measuring.extents import Table, table_of
from groundkern.hf.measuring.kept import Kept, config_key, settings_key
from groundkern.hf.measuring.owners import owners_of
from groundkern.hf.measuring.places import places_of
from groundkern.hf.model.support import base_model

if TYPE_CHECKING:
    from PIL import Image


class MeasuredGeometry:
    """Where visual tokens are, measured once for each sample's sizes of images.

    Give it to `GroundingCollator(geometry=...)`. A sample's images are measured together, because
    some models show one of several images in another way than a single one.

    It has no model in a copy that was pickled and in a DataLoader's workers, which know what
    `measure` measured before they were started, and what is in `cache`.

    Args:
        model: on its device, with weights; attached or not, PEFT's or not. Nothing of it changes.
        processor: the model's.
        cache: a folder that keeps what was measured, for the next run; None: nothing is kept.

    Raises:
        ValueError: a model without an id of visual tokens.
    """

    def __init__(
        self, model: nn.Module, processor: Any, *, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self._model: nn.Module | None = model
        self._processor, config = processor, base_model(model).config
        self._config = config_key(config)  # now: a Trainer changes settings that do not matter
        token = image_token_id(config, processor)
        if token is None:
            fail("config.image_token_id", "the id of visual tokens", None)
        self._image_token = token
        self._kept = None if cache is None else Kept(cache)
        self._tables: dict[tuple[str, tuple[Size, ...]], Table] = {}

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], batch: Mapping[str, Any]
    ) -> list[Tensor]:
        """The place of every visual token of every sample, as `image_geometry` returns them.

        Args:
            images: the original images of each sample.
            batch: what the processor returned for all of them; not used.

        Returns:
            fp64 [C, 5] for each sample: `(image, x0, y0, x1, y1)` in fractions of the image. A
            token that shows padding alone has no place; rectangles end at the image's sides.

        Raises:
            ValueError: tokens that have no place; sizes that were not measured, in a worker.
        """
        return [
            table.places.clone()
            for table in self.measure([[image.size for image in sample] for sample in images])
        ]

    def measure(self, samples: Iterable[Sequence[Size]]) -> list[Table]:
        """Measure ahead, so that workers need no model.

        Args:
            samples: (width, height) in pixels of each image, for each sample.

        Returns:
            The tables, each with its error in pixels.

        Raises:
            ValueError: as a call does.
        """
        settings = settings_key(self._processor, self._config)
        return [
            self._table(settings, tuple((width, height) for width, height in sizes))
            for sizes in samples
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def _table(self, settings: str, sizes: tuple[Size, ...]) -> Table:
        key = (settings, sizes)
        if key not in self._tables:
            kept = self._kept and self._kept.find(settings, sizes)
            self._tables[key] = kept or self._measured(settings, sizes)
        return self._tables[key]

    def _measured(self, settings: str, sizes: tuple[Size, ...]) -> Table:
        if not sizes:
            return Table(torch.zeros(0, 5, dtype=torch.float64), 0.0)
        if self._model is None or get_worker_info() is not None:
            wanted = "sizes measured before (`measure`) or a process with the model (no workers)"
            fail("geometry", wanted, f"images of {list(sizes)}")
        with torch.inference_mode(False):
            batch, places, error = places_of(self._processor, sizes)
            picture = {name: place.image >= 0 for name, place in places.items()}
            owners = owners_of(self._model, batch, picture, self._image_token)
            (at,) = (batch["input_ids"][0] == self._image_token).nonzero(as_tuple=True)
            runs = (at - torch.arange(len(at))).tolist()
            table = table_of(places, owners, sizes, runs, error)
        if self._kept:
            self._kept.keep(settings, sizes, table)
        return table
