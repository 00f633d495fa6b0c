"""Runs on wrong regions (`control` of SMAM and KLAL): what collators need, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from groundkern.hf.data.controls import SampleRegions, key_of
from groundkern.trainer.config import Config
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.data.rasters import with_rasters
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.streaming.stream import SampleStream

FIRST = 256  # samples of a stream among which others' regions are found
TITLES = {"smam": "SMAM", "klal": "KLAL"}
MEANINGS = {
    "shuffled": "another sample's regions",
    "random": "its regions at a random place",
    "complement": "what its regions do not cover",
}


class PoolOfDataset:
    """The regions of all samples of a data set that have any, each read when it is asked for.

    Args:
        dataset: with an index.
    """

    def __init__(self, dataset: JsonLinesDataset | Mixture) -> None:
        self._dataset, self._indices = dataset, np.flatnonzero(dataset.counts["regions"])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> SampleRegions | None:
        """None: a sample that cannot be read."""
        try:
            return regions_of(self._dataset.sample(int(self._indices[index])))
        except SampleError:  # its own turn reports it
            return None


def regions_of(sample: Sample) -> SampleRegions:
    """The regions of a sample, without its pixels.

    Raises:
        SampleError: a raster that cannot be decoded.
    """
    spans = tuple((video.start, min(video.end, video.duration)) for video in sample.videos)
    key = key_of(sample.where, sample.messages, sample.regions)
    return SampleRegions(key, with_rasters(sample.regions, sample.rasters), spans)


def pool_of(
    samples: JsonLinesDataset | Mixture | SampleStream,
) -> Sequence[SampleRegions | None]:
    """Where "shuffled" finds the regions of other samples: a stream's are among its first ones."""
    if isinstance(samples, SampleStream):
        return [_readable(sample) for sample in samples.first(FIRST) if sample.regions]
    return PoolOfDataset(samples)


def _readable(sample: Sample) -> SampleRegions | None:
    try:
        return regions_of(sample)
    except SampleError:
        return None


def controlled(config: Config, samples: JsonLinesDataset | Mixture | SampleStream) -> dict:
    """The options of the collator that makes the training batches of a run.

    Args:
        config: the run's settings.
        samples: its training samples.
    """
    controls = _controls(config.objectives)
    if not controls:
        return {}
    return {
        "side_control": controls.get("smam"),
        "map_control": controls.get("klal"),
        "control_pool": pool_of(samples) if "shuffled" in controls.values() else None,
        "control_seed": config.training.seed,
    }


def control_of(objectives: Any) -> str | None:
    """What a run's controls are, in words; None: it is not one.

    Args:
        objectives: of a config, or of its record.
    """
    found = [
        f"{TITLES[name]} on {MEANINGS[control]}" for name, control in _controls(objectives).items()
    ]
    return " and ".join(found) or None


def _controls(objectives: Any) -> dict[str, str]:
    """The controls by objective."""
    found = {}
    for name in TITLES:
        how = _get(objectives, name)
        if how is not None and (control := _get(how, "control")) is not None:
            found[name] = control
    return found


def _get(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else getattr(values, name)
