"""What those who watch a run need without torch: its error, and numbers as JSON holds them."""

from __future__ import annotations

import math
from typing import Any


class DivergedError(FloatingPointError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def finite_or_none(value: Any) -> Any:
    """Plain values as strict JSON can hold them: None for NaN and infinities.

    Args:
        value: dicts, lists, numbers, strings.
    """
    if isinstance(value, dict):
        return {name: finite_or_none(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None) -> float:
    """A float as `finite_or_none` left it."""
    return math.nan if value is None else value
