"""A term without a row is 0, which looks like a good loss: said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

STEPS = 16  # of a run that is long enough
# One part of each objective, which is above 0 wherever there is a row: a margin may be kept.
NEVER_ZERO = (
    "word",
    "smam_cross_entropy",
    "map_kl",
    "lens_raise",
    "basic_direction",
    "patch_text",
    "phrase",
)


class IdleTerms:
    """Looks at log lines until the first steps are over."""

    def __init__(self) -> None:
        self.done = False  # of a run that went on too: its first steps are over
        self._seen: dict[str, bool] = {}  # by part, whether it was ever above 0

    def look(self, means: Mapping[str, float], step: int, last: int) -> None:
        """Look at a log line.

        Args:
            means: of the parts of the loss, by name; none: no batch had `gk_` tensors.
            step: how many were taken.
            last: how many the run takes.
        """
        for name, mean in means.items():
            self._seen[name] = self._seen.get(name, False) or mean != 0.0
        if self.done or step < min(STEPS, last):
            return
        self.done = True
        idle = [name for name in NEVER_ZERO if self._seen.get(name) is False]
        where = "docs/troubleshooting/nothing-learned.md"
        if not self._seen:
            warnings.warn(
                f"no batch of the first {step} steps had gk_ tensors, so that the attached losses "
                f"train nothing: make batches by GroundingCollator ({where})",
                stacklevel=2,
            )
        elif idle:
            warnings.warn(
                f"`{', '.join(idle)}`: 0 in each of the first {step} steps, so that it trains "
                f"nothing: no batch had a row for it; look at the collator's counts ({where})",
                stacklevel=2,
            )
