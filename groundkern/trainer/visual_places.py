"""Where, and in a video when, each visual token of a sample is, in the order of the columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundkern.hf.data.example import GroundedExample  # not by way of hf: no Trainer here
from groundkern.hf.data.geometry.videos import video_geometry


class VisualPlaces(NamedTuple):
    """The visual tokens of a sample.

    Args:
        number: int64 [C], the image, or behind all images the video, that each shows.
        times: fp64 [C, 2], the seconds from which and up to which; -1 of an image.
        rects: fp64 [C, 4], in fractions of the image or of the frame; -1 without a place.
    """

    number: Tensor
    times: Tensor
    rects: Tensor

    @property
    def placed(self) -> Tensor:
        """bool [C]: which have a place."""
        return self.rects[:, 2] > self.rects[:, 0]

    def of(self, number: int, time: float | None = None) -> Tensor:
        """bool [C]: which have a place in an image, or in the frame of a video at a time."""
        found = self.placed & (self.number == number)
        if time is None:
            return found
        return found & shown_at(self.times, time)


def shown_at(times: Tensor, time: float) -> Tensor:
    """bool [C]: which of the tokens show a second of the video.

    Args:
        times: [C, 2], of `VisualPlaces`.
        time: in seconds.
    """
    return (times[:, 0] <= time) & (time < times[:, 1])


def visual_places(
    collator: Any, example: GroundedExample, batch: dict[str, Tensor]
) -> VisualPlaces:
    """The visual tokens of a sample that was collated alone.

    Args:
        collator: a `GroundingCollator`, or one around it.
        example: the sample.
        batch: what the collator made of it.
    """
    inner = getattr(collator, "collator", collator)
    (images,) = inner.geometry([example.images], batch)
    (videos,) = video_geometry(inner.processor, inner.config, [example.videos], batch)
    columns = batch["gk_map_columns"][0]
    columns = columns[columns >= 0].long()
    number = batch["gk_image"][0, columns].long()
    of_video = number >= len(example.images)
    table = torch.full((len(columns), 6), -1.0, dtype=torch.float64)
    table[~of_video, 2:] = images[:, 1:].double()
    table[of_video] = videos[:, 1:]
    return VisualPlaces(number, table[:, :2], table[:, 2:])
