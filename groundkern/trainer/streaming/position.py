"""How far a run has come in a stream: of the batches that it trained, not of those it prefetched.

Kept with a checkpoint in `stream.json`: how many readers there were, and where each stood.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from groundkern.trainer.streaming.stream import Place, SampleStream

logger = logging.getLogger(__name__)

FILE = "stream.json"


class Position:
    """Where the readers of this process stand.

    Args:
        stream: what they read.
    """

    def __init__(self, stream: SampleStream) -> None:
        self._stream, self._batches = stream, 0
        self._places: dict[int, Place] = {}

    def note(self, reader: tuple[int, Place] | None) -> None:
        """One more batch was trained.

        Args:
            reader: number and place of the one that gave it, behind its last sample.
        """
        self._batches += 1
        if reader is not None:
            number, place = reader
            self._places[number] = place

    def saved(self) -> dict[str, Any]:
        """Plain values of this process's readers, for `merged`."""
        return {
            "ranks": self._stream.ranks,
            "workers": self._stream.workers,
            "batches": self._batches,
            "places": {str(number): list(place) for number, place in self._places.items()},
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on where a checkpoint was; the stream's `rank`, `ranks` and `workers` are set.

        With the same readers the next samples are those that would have come. With others it goes
        on after as many samples, in another order: of this epoch some come twice and some not.

        Args:
            saved: what `merged` made; None: from the beginning.
        """
        stream = self._stream
        if saved is None:
            return
        places = {int(number): Place(*place) for number, place in saved["places"].items()}
        workers = max(1, stream.workers)
        readers = stream.ranks * workers
        before = saved["ranks"] * max(1, saved["workers"])
        if (saved["ranks"], max(1, saved["workers"])) == (stream.ranks, workers):
            stream.starts, stream.turn = places, saved["batches"] % workers
            self._batches, self._places = saved["batches"], self._own(places)
            return
        known = [places.get(number, Place()) for number in range(before)]
        epoch = min(place.epoch for place in known)
        there = [place.records for place in known if place.epoch == epoch]
        records = round(sum(there) / len(there) * before / readers)
        stream.starts = {number: Place(epoch, records) for number in range(readers)}
        self._places = self._own(stream.starts)  # a reader may give nothing until the next save
        logger.warning(
            "data.streaming: %d readers (processes x workers) go on where %d were: after as many "
            "samples, in another order",
            readers,
            before,
        )

    def _own(self, places: dict[int, Place]) -> dict[int, Place]:
        """The places of this process's readers."""
        workers, rank = max(1, self._stream.workers), self._stream.rank
        return {n: place for n, place in places.items() if n // workers == rank}


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `Position.saved` gave on every process, as one."""
    places = {number: place for part in parts for number, place in part["places"].items()}
    return {**parts[0], "places": places}
