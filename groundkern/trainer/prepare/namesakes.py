"""Finds the images of annotations: where the annotation says, else by the end of their path.

Folders of images are often moved, so that a name has to do. Where several annotated paths lead to
the same file (`left/1.jpg` and `right/1.jpg` to `1.jpg`), it does not: one would get the other's
image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from groundkern.trainer.prepare.placing import first_there
from groundkern.trainer.prepare.reading import Table


class Where(NamedTuple):
    """Where an image may lie below the root.

    Args:
        image: what tells it from the others of its annotations.
        places: by what its annotation says, the most likely first.
        by_name: besides, if no other image may lie there.
    """

    image: str
    places: Sequence[str]
    by_name: Sequence[str]


class Images:
    """The images below a root.

    Args:
        root: the folder that paths start from.
        everyone: starts a pass over all images of the annotations; it is made once, when the first
            of them is not where its annotation says.
    """

    def __init__(self, root: Path, everyone: Callable[[], Iterable[Where]]) -> None:
        self._root, self._everyone = root, everyone
        self._owners: Table | None = None

    def find(self, where: Where) -> str:
        """The path below the root of an image; the first of its `places` if it is nowhere."""
        found = first_there(self._root, where.places)
        if not self.there(found):
            other = first_there(self._root, [*where.by_name, found])
            if self.there(other) and not self._of_others(other, where.image):
                return other
        return found

    def there(self, name: str) -> bool:
        """Whether a path is a file below the root."""
        try:
            return (self._root / name).is_file()
        except (OSError, ValueError):  # a name that is too long, or has a null character
            return False

    def _of_others(self, path: str, image: str) -> bool:
        if self._owners is None:
            self._owners = Table()
            for each in self._everyone():
                for stem in dict.fromkeys(map(_stem, [*each.places, *each.by_name])):
                    known = self._owners.get(stem)
                    if len(known) < 2 and each.image not in known:
                        self._owners.add(stem, each.image)
        return any(owner != image for owner in self._owners.get(_stem(path)))


def _stem(path: str) -> str:
    """A path without its ending, of which formats try several."""
    return os.path.splitext(path)[0]


def within(path: str, *folders: str) -> list[str]:
    """Where something may lie below the root: as it is named, and in folders."""
    path = path.replace("\\", "/")
    return [path, *(f"{folder}/{path}" for folder in folders)]


def last_of(path: str) -> str:
    """The file's name at the end of a path of any system."""
    return PurePosixPath(path.replace("\\", "/")).name
