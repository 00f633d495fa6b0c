"""What was made last, by what it was made of: samples of one image often stand together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from PIL import Image

from groundkern.trainer.data.images import load_rgb

KEPT = 4
LARGE = 8_000_000  # pixels of an image that is not kept


class Recent:
    """The last few images, decoded, and the last few pictures of the page, encoded."""

    def __init__(self) -> None:
        self._decoded: dict[Hashable, Any] = {}
        self._encoded: dict[Hashable, Any] = {}

    def decode(self, path: Path, size: tuple[int, int], *, where: str, field: str) -> Image.Image:
        """`groundkern.trainer.data.images.load_rgb`, once for several samples in a row."""

        def load() -> Image.Image:
            return load_rgb(path, size, where=where, field=field)

        if size[0] * size[1] > LARGE:
            return load()
        return _once(self._decoded, (path, size), load)

    def encode(self, key: Hashable, make: Callable[[], str]) -> str:
        """What `make` returns, once for one key."""
        return _once(self._encoded, key, make)


def _once(kept: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in kept:
        made = make()
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = made
    return kept[key]
