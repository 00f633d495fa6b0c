"""Which geometry a run uses: the family's table, or one that is measured on the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from groundkern.hf import MeasuredGeometry, image_geometry
from groundkern.hf.data.geometry import Geometry, check_family
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import DataChanged, SampleError
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.progress import progress

Kind = Literal["auto", "table", "measured"]
FOLDER = "geometry"  # of a run's output, with what was measured


def geometry_of(
    model: torch.nn.Module, processor: Any, kind: Kind = "auto", *, cache: Path | None = None
) -> Geometry:
    """The geometry of a model's visual tokens; says so in one line if it is measured.

    Args:
        model: with PEFT's wrapper or without, on its device.
        processor: the model's.
        kind: "table" is that of the family, "measured" is measured; "auto": the table if there is
            one.
        cache: a folder that keeps what is measured.

    Raises:
        ConfigError: "table" for a family that has none; a model that cannot be measured.
    """
    if kind != "measured":
        try:
            check_family(model.config.model_type)
            return partial(image_geometry, processor, model.config)
        except ValueError as error:
            if kind == "table":
                raise ConfigError(f"`data.geometry`: {error}") from None
    try:
        measured = MeasuredGeometry(model, processor, cache=cache)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    why = "as asked for" if kind == "measured" else f"{model.config.model_type!r} has no table"
    print(f"The places of visual tokens are measured on the model: {why}.", flush=True)
    return measured


def measure_ahead(geometry: Geometry, datasets: Sequence[JsonLinesDataset | Mixture]) -> None:
    """Measure every size of image, for workers that have no model; nothing to do for a table.

    Args:
        geometry: of `geometry_of`.
        datasets: whose samples will be collated.

    Raises:
        ConfigError: visual tokens that have no place.
        DataChanged: a file is not what it was.
    """
    if not isinstance(geometry, MeasuredGeometry):
        return
    seen = set()
    with progress("measure images", total=sum(map(len, datasets)), unit="sample") as bar:
        for dataset in datasets:
            for index in range(len(dataset)):
                bar.update()
                try:
                    sizes = dataset.sample(index).sizes
                except DataChanged:
                    raise
                except SampleError:  # it will be reported when its turn comes
                    continue
                if sizes not in seen:
                    seen.add(sizes)
                    _measure(geometry, sizes)
                    bar.set_postfix(sizes=len(seen), refresh=False)


def _measure(geometry: MeasuredGeometry, sizes: Sequence[tuple[int, int]]) -> None:
    try:
        geometry.measure([sizes])
    except ValueError as error:
        if str(error).startswith("`"):  # a sentence for the user, and not the processor's own error
            raise ConfigError(str(error)) from None
