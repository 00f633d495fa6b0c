"""Tiny random models of transformers' vision-language families, with their real processors.

One module to a way of laying images out; each has `FAMILIES`, by `config.model_type`. A second
family of a type has a name behind a colon: `llava:pixtral`.
"""

from __future__ import annotations

from benchmarks.families.zoo import first, grids, qwens, rows, slices, tiles
from benchmarks.families.zoo.making import Family

GROUPS = (first, tiles, qwens, grids, rows, slices)


def families() -> dict[str, Family]:
    """Every family that can be built, by `config.model_type`."""
    return {name: family for group in GROUPS for name, family in group.FAMILIES.items()}
