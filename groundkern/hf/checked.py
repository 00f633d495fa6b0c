"""How the fields of an objective are checked: by their types, which have names here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from groundkern.messages import fail, require

LARGEST, MOST_LAYERS = 1e9, 10_000  # above these a number is a slip
Maps = Literal["attention", "gradcam"]
Layers = tuple[int, ...] | None
Chosen = tuple[int, ...] | Literal["last", "all"]
Control = Literal[None, "shuffled", "random", "complement"]
Heads = tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Checked:
    """Checks the fields of a dataclass by their types; every float is a weight or a margin."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            kind, value = kinds[name], getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                fail(name, " or ".join(map(str, get_args(kind))), value)
            if kind is float:
                require(0.0 <= value <= LARGEST, name, f"a number in [0, {LARGEST:g}]", value)
            words = {Layers: (None,), Chosen: ("last", "all")}.get(kind)
            if words is not None and value not in words:
                ascending = not isinstance(value, str) and bool(value)
                ascending = ascending and list(value) == sorted(set(value))
                ascending = ascending and value[0] >= 0 and value[-1] < MOST_LAYERS
                wanted = "distinct layer numbers in ascending order, or "
                require(ascending, name, wanted + " or ".join(map(str, words)), value)
            if kind == Heads and value is not None:
                wanted = "distinct pairs of a layer and a head, or None"
                require(_are_pairs(value), name, wanted, value)


def _are_pairs(value: tuple[object, ...]) -> bool:
    """Whether these are distinct pairs of numbers, at least one."""
    pairs = [tuple(pair) for pair in value if isinstance(pair, tuple | list)]
    good = all(len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in pairs)
    return good and 0 < len(pairs) == len(value) == len(set(pairs))
