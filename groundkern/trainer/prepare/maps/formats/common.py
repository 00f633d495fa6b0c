"""What the formats share: their options, what they return, labelled places to records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.sources import Unusable

Records = Iterator[tuple[str, Any]]
Labelled = tuple[str, dict]  # a label and one of its places

NO_PLACES = "images without annotations"
NO_LABEL = "places without a label"
_LISTED = 16  # files of a folder that a message names


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare maps DATA` that decide what a format reads.

    Args:
        data: file or folder of the annotations; it is there.
        images: the folder of the images, if given.
        prefer: "box" or "mask": which of the two is the place of a thing that has both.
        split: name of a part, of a format that has parts.
        names: the file with the images and categories of annotations that have only their numbers.
        output: the JSON-lines file to make; images inside annotations are written beside it.
    """

    data: Path
    images: Path | None = None
    prefer: str = "box"
    split: str | None = None
    names: Path | None = None
    output: Path = Path("out.jsonl")

    @property
    def root(self) -> Path:
        """The folder of the images: the one given, else the data's."""
        return self.images or (self.data if self.data.is_dir() else self.data.parent)


@dataclass(frozen=True)
class Annotations:
    """Opened annotations.

    Args:
        read: starts a fresh pass over the records, as (where, value) pairs.
        files: what is read; a continued run compares their sizes and times.
        root: the folder that the records' image paths start from.
    """

    read: Callable[[], Records]
    files: Sequence[Path]
    root: Path


def by_label(where: str, image: str, places: Iterable[Labelled], size: Any = None) -> Records:
    """A record for each label of one image, in the order in which they first occur.

    Args:
        where: what their names start with.
        image: its path below the root.
        places: (label, place) pairs.
        size: (width, height) of the image that was annotated, if the format says it.
    """
    groups: dict[str, list[dict]] = {}
    for label, place in places:
        groups.setdefault(label.strip(), []).append(place)
    for label, found in groups.items():
        record = {"image": image, "label": label, "places": found}
        yield f"{where}: {label!r}", record if size is None else {**record, "size": size}


class Files(Sequence):
    """Paths kept as texts, since a `Path` takes a kilobyte and a data set may have a million.

    Args:
        names: the texts.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(self.names[index])


def files_of(data: Path, suffix: str, what: str) -> Files:
    """The file itself, or the folder's files of a suffix by name, hidden ones left out.

    Raises:
        ConfigError: there are none.
    """
    found = [str(data)] if data.is_file() else _below(data, lambda name: name.endswith(suffix))
    found = sorted(found, key=lambda name: name.replace(os.sep, "\0"))  # as Paths compare
    if not found:
        raise ConfigError(f"{data}: expected {what}, got none")
    return Files(found)


def only_file(data: Path, suffix: str, what: str) -> Path:
    """The file, or the only one of a suffix in a folder.

    Raises:
        ConfigError: there are none or several.
    """
    if data.is_file():
        return data
    found = sorted(data.glob(f"*{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:_LISTED]) or "none"
        raise ConfigError(f"{data}: expected {what}, got {names}; name the file")
    return found[0]


def image_files(root: Path) -> Iterator[str]:
    """The images below a folder by their extension, relative to it, hidden ones left out."""
    known = Image.registered_extensions()
    for file in _below(root, lambda name: os.path.splitext(name)[1].lower() in known):
        yield os.path.relpath(file, root)


def _below(root: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The files below a folder whose names are wanted, those of a folder before its folders'."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if wanted(name) and not name.startswith("."):
                yield os.path.join(folder, name)


def passed(original: Any, kind: str, why: str) -> Unusable:
    """Something that is passed over by intent, counted as one of `kind`."""
    return Unusable(original, why, kind)


def unplaced(name: str) -> Unusable:
    """An image, or its file, that has no annotation."""
    return passed(name, NO_PLACES, "expected annotations, got none")


def is_size(values: Any) -> bool:
    """Whether a format says how large its image was: two whole numbers above 0."""
    return all(type(value) is int and 0 < value < 1 << 24 for value in values)
