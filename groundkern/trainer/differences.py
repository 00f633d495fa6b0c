"""What differs between settings, as nested plain values: between two runs, or two starts of one."""

from __future__ import annotations

from typing import Any

import yaml


def differences(old: dict, new: dict, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """`name: old -> new` of the fields that differ in nested plain values.

    Args:
        old, new: as `Config.model_dump(mode="json")` makes them.
        ignore: beginnings of dotted names that do not count.
    """
    left, right = _flat(old), _flat(new)
    return [
        f"{name}: {show(left.get(name))} -> {show(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(ignore)
    ]


def show(value: Any) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return flat
