"""What the numbers of a file's boxes probably count: said as a warning, never acted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from groundkern.trainer.places.patterns import Numbers
from groundkern.trainer.places.units import UNITS, Size

LOOKED_AT = 1000  # records from which a file is judged before the work begins
_SLACK = 1.01  # a box that sticks out a little is no evidence

# What the numbers may be said to count (None: nobody said), and what they may look like then.
_CONSISTENT: dict[str | None, tuple[str, ...]] = {
    "pixel": ("pixel",),
    "resized": ("pixel", "resized", "per_mille"),
    "per_mille": ("per_mille", "pixel"),
    "percent": ("pixel", "per_mille"),
    "unit": ("unit",),
    "square": ("unit",),
    None: (),
}
_MOST = {"per_mille": 1000.0, "percent": 100.0, "unit": 1.0, "square": 1.0}


@dataclass
class Kinds:
    """The numbers of boxes and points whose notation does not say what they count.

    Args:
        unit: what they are taken to count; None: unknown, and they are no regions.
    """

    unit: str | None = None
    seen: int = 0
    first: str = ""
    _most: float = 0.0
    _larger: int = 0
    _where: dict[str, str] = field(default_factory=dict)

    def add(self, numbers: Numbers, size: Size, where: str) -> None:
        """Takes a box or point of an image of (width, height); `where` is its record."""
        self.seen += 1
        self.first = self.first or where
        self._most = max(self._most, *numbers)
        sides = [size[i % 2] for i in range(len(numbers))]
        if any(number > side * _SLACK for number, side in zip(numbers, sides, strict=True)):
            self._where.setdefault("beyond", where)
        if max(size) > 1000:
            self._larger += 1
            self._where.setdefault("larger", where)
        if max(numbers) > 1000:
            self._where.setdefault("thousand", where)

    def likely(self) -> tuple[str, str, str]:
        """(the likely unit, why, the first record that shows it); "pixel" if nothing speaks
        against it."""
        if self._most <= 1:
            return "unit", "never leave [0, 1]", self.first
        if "beyond" in self._where and "thousand" not in self._where:
            return "per_mille", "leave their image, but never [0, 1000]", self._where["beyond"]
        if "beyond" in self._where:
            return "resized", "leave their image", self._where["beyond"]
        if self._larger and "thousand" not in self._where:
            why = f"never leave [0, 1000], though images of {self._larger:,} of them are larger"
            return "per_mille", why, self._where["larger"]
        return "pixel", "lie within their images", self.first

    def warning(self, option: str, spelling: Mapping[str, str] | None = None) -> str | None:
        """One sentence if the numbers do not look like their unit, or nobody said it.

        Args:
            option: how a user says it, such as `--coord`.
            spelling: its values, by the units that it can say; default: by their own names.
        """
        if not self.seen:
            return None
        unit, why, where = self.likely()
        within = self._most <= _SLACK * _MOST.get(self.unit, float("inf"))
        if within and unit in _CONSISTENT[self.unit]:
            return None
        if spelling is not None and unit not in spelling:
            return None
        said = (spelling or {}).get(unit, unit)
        counted = f"numbers of {self.seen:,} boxes or points {why}"
        taken = "what they count is not said, so that they are not used"
        if self.unit is not None:
            taken = f"taken for {UNITS[self.unit]}"
        likely = f"probably {UNITS[unit]} ({option} {said})"
        if self.unit is None and unit == "pixel":
            likely += f", or {UNITS['resized']} ({option} resized)"
        return f"{where}: {counted}: {likely}; {taken}"
