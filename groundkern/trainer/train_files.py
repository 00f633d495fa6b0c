"""The two forms of `data.train`: one path, or files with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Discriminator, Field, Tag


class TrainFile(BaseModel, extra="forbid", frozen=True):
    """A file of training samples among several.

    Args:
        path: as `data.train` alone would have it.
        weight: times that an epoch takes its samples: 2 is twice, 0.5 another half each time.
        root: the folder of its images; None: `data.root`.
    """

    path: Path
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    root: Path | None = None


_ONE, _SEVERAL = "<one>", "<several>"  # pydantic's names of the forms
TrainFiles = Annotated[
    Annotated[Path, Tag(_ONE)]
    | Annotated[list[TrainFile], Field(min_length=1, max_length=1000), Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list) else _ONE),
]


def without_forms(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A field's path as pydantic reports it, as a user writes it."""
    return tuple(part for part in loc if part not in (_ONE, _SEVERAL))
