"""Engines: how the main attention of a sequence that is split over ranks is computed.

engine.py    what an engine is given, and what all of them refuse
gather.py    keys and values of all ranks come to every rank: documents, padding and windows too
tokens.py    how they come; pieces.py: which of those keys the tokens of a rank see, run by run
ring.py      torch's context parallelism; ulysses.py: DeepSpeed's sequence parallelism
demands.py   what these two ask of a batch
"""

from __future__ import annotations

from collections.abc import Callable

from groundkern.hf.model.engines.engine import Engine

__all__ = ["ENGINES", "ORDER", "Engine"]


def _gather() -> Engine:
    from groundkern.hf.model.engines.gather import GatherEngine

    return GatherEngine()


def _ring() -> Engine:
    from groundkern.hf.model.engines.ring import RingEngine

    return RingEngine()


def _ulysses() -> Engine:
    from groundkern.hf.model.engines.ulysses import UlyssesEngine

    return UlyssesEngine()


ORDER = {"ring": "zigzag", "ulysses": "contiguous"}  # the only one that an engine takes
ENGINES: dict[str, Callable[[], Engine]] = {"gather": _gather, "ring": _ring, "ulysses": _ulysses}
