"""A policy whose attention is that of its references learns nothing from (R2): said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

STILL = 1e-6  # nats: the rounding of a divergence that is 0
STEPS = 16  # more than one rollout is trained on


class StillPolicy:
    """Looks at the divergence that is logged, until it is not 0 or a warning was given."""

    def __init__(self) -> None:
        self._done = False

    def look(self, means: Mapping[str, float], step: int) -> None:
        """Look at a log line.

        Args:
            means: of the parts of the loss, by name.
            step: how many were taken.
        """
        divergence = means.get("policy_divergence")
        if self._done or divergence is None:
            return
        self._done = divergence > STILL or step >= STEPS
        if divergence <= STILL and step >= STEPS:
            warnings.warn(
                f"`policy`: attention was that of its references in the first {step} steps, so "
                "that it trained nothing: take several updates a rollout, with references from "
                "before the first; or no batch had rows",
                stacklevel=2,
            )
