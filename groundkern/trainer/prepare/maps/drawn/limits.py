"""Bounds of a task's own settings."""

from __future__ import annotations


def limit(name: str, value: int, low: int, high: int) -> None:
    """Raise the `ValueError` that names the bounds, unless `value` is in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"`{name}`: expected {low} to {high}, got {value}")
