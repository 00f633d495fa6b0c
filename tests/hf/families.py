"""The families that every test of the wiring runs on; the whole zoo has tests/hf/zoo/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.families.zoo import first, tiles
from benchmarks.families.zoo.making import Family, Unavailable
from groundkern.hf.data.geometry import check_family


def _served(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """The maker of a family's processor; it skips the test if this transformers is too old."""

    def processor(**settings) -> Any:
        try:
            check_family(name)
            return make(**settings)
        except (ValueError, Unavailable) as error:
            pytest.skip(str(error))

    return processor


FAMILIES = {
    name: Family(family.model, _served(name, family.processor))
    for name, family in (first.FAMILIES | tiles.FAMILIES).items()
}
