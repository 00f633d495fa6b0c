"""The images and pages that a path means: a folder, an image, a PDF or a TIFF with pages.

Of a folder, everything that is passed over is counted by the reason why.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.file_kinds import ADVICE, DOCUMENTS, HEAD, PICTURES, kind_of
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.documents import Page, chosen_pages, page_frames
from groundkern.trainer.prepare.shards import is_shard_of
from groundkern.trainer.prepare.sources import Item, Source, digest

# Extensions that Pillow knows of files that hold no picture, or pages.
_NOT_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".iim"}
_MAY_HAVE_PAGES = {".tif", ".tiff"}
_LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}
NAMED = 3  # files of each reason that the summary names


@dataclass
class PassedOver:
    """Files and folders that are no input, by the reason why.

    Attributes:
        found: how many, and the names of the first.
    """

    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts one."""
        number, first = self.found.setdefault(reason, (0, []))
        self.found[reason] = number + 1, [*first, name] if number < NAMED else first

    def record(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {reason: {"count": n, "first": first} for reason, (n, first) in self.found.items()}

    def told(self) -> list[str]:
        """A line for each reason."""
        return [
            f"passed over, {reason}: {number:,} ({', '.join(first)}{', ...' * (number > NAMED)})"
            for reason, (number, first) in sorted(self.found.items())
        ]


@dataclass(frozen=True)
class Pictures:
    """Inputs and the data root that their image paths start from."""

    source: Source
    root: Path
    passed_over: PassedOver


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder, an image or a document, and no file of samples."""
    try:
        return path.is_dir() or (path.is_file() and _kind(path) is not None)
    except OSError:
        return False


def find_pictures(
    path: Path, *, output: Path, root: Path | None = None, pages: str | None = None
) -> Pictures:
    """The images and pages of a path, by name.

    A file whose extension Pillow knows is an image, one with another or none is what its first
    bytes say. What an image holds is checked when its turn comes.

    Args:
        path: folder, image, PDF or TIFF.
        output: samples to make. Pages are written to the folder of its name beside it.
        root: data root; default: the folder, or, if there are pages and the output is elsewhere,
            the closest folder that both are in.
        pages: see `chosen_pages`.

    Raises:
        ConfigError: no image there, or images or the output outside `root`.
    """
    passed_over, wanted = PassedOver(), chosen_pages(pages)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = sorted(_files(path, output, passed_over))
    else:
        files = [(path.name, _kind(path))]
    entries = [(name, kind, _pages(folder / name, kind, name)) for name, kind in files]
    if not entries:
        told = "".join(f"; {line}" for line in passed_over.told())
        raise ConfigError(f"{path}: expected a folder with images, got one without{told}")
    documents = any(frames is not None for *_, frames in entries)
    images = any(frames is None for *_, frames in entries)
    root = _root(folder, output, root, images=images, documents=documents)

    def read() -> Iterator[Item]:
        made = f"{os.path.relpath(output.parent, root)}/{output.stem}_pages"
        below = os.path.relpath(folder, root)
        index = 0
        for name, kind, frames in entries:
            for item in _items(folder / name, name, kind, frames, wanted):
                value = item.value
                if isinstance(value, Page):
                    image = os.path.normpath(f"{made}/{name}/{value.number:04d}.png")
                    value = Page(value.file, kind, value.number, value.frame, image)
                elif value is not None:
                    value = os.path.normpath(os.path.join(below, value))
                yield Item(index, item.where, value, item.original, item.problem)
                index += 1

    total = sum(
        1 if not isinstance(frames, list) else max(1, len(_selected(frames, wanted)))
        for *_, frames in entries
    )
    parts = [name if frames is None else f"{name}: {frames}" for name, _, frames in entries]
    identity = {"folder": path.name, "names": digest(parts)}
    return Pictures(Source(read, total, identity, passed_over.record()), root, passed_over)


def _items(
    file: Path, name: str, kind: str, frames: list[int] | str | None, wanted: Sequence[range]
) -> Iterator[Item]:
    """The inputs of one file, without their numbers: an image, pages, or what is wrong with it."""
    if frames is None:
        yield Item(0, name, name)
    elif isinstance(frames, str):
        yield Item(0, name, None, name, frames)
    elif not (selected := _selected(frames, wanted)):
        problem = f"{name}: `--pages`: expected pages of the {len(frames)} there, got others"
        yield Item(0, name, None, name, problem)
    else:
        for number in selected:
            original = {"file": name, "page": number}
            page = Page(file, kind, number, frames[number - 1], "")
            yield Item(0, f"{name} page {number}", page, original)


def _selected(frames: list[int], wanted: Sequence[range]) -> list[int]:
    return [n for n in range(1, len(frames) + 1) if any(n in each for each in wanted)]


def _pages(file: Path, kind: str, name: str) -> list[int] | str | None:
    """Frames of a document; why it cannot be used; None: an image, a TIFF with one page too."""
    if kind not in DOCUMENTS:
        return None
    try:
        frames = page_frames(file, kind, where=name)
    except SampleError as error:
        return str(error) if kind == "PDF" else None  # the image's own checks name what is wrong
    return None if kind == "TIFF" and frames == [0] else frames


def _root(folder: Path, output: Path, root: Path | None, *, images: bool, documents: bool) -> Path:
    """The data root, known to hold the images that are there and those that are to be made."""
    needed = [folder] * images + [output.parent] * documents
    if root is None:
        return (
            Path(os.path.commonpath([each.resolve() for each in needed])) if documents else folder
        )
    for each in needed:
        if not each.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"--root: expected a folder that {each} is in, got {root}")
    return root


def _files(path: Path, output: Path, passed_over: PassedOver) -> Iterator[tuple[str, str]]:
    """(name relative to the folder, kind) of each file that is an input."""
    real = path.resolve()
    own = output.parent.resolve()

    def unreadable(error: OSError) -> None:
        passed_over.add("folder that cannot be read", os.path.relpath(error.filename, path))

    for place, folders, files in os.walk(path, onerror=unreadable):
        for name in list(folders):
            relative = os.path.relpath(os.path.join(place, name), path)
            made = Path(place).resolve() == own and name == f"{output.stem}_pages"
            if made:
                reason = None
            elif not (reason := _hidden(name) or _made_before(place, name) or _linked(place, name)):
                continue
            folders.remove(name)
            if reason:
                passed_over.add(reason, relative)
        for name in files:
            ours = name.startswith(output.name) or is_shard_of(name, output)
            if ours and Path(place).resolve() == own:
                continue
            relative = os.path.relpath(os.path.join(place, name), path)
            kind, reason = _judged(Path(place) / name, real)
            if kind is None:
                passed_over.add(reason, relative)
            else:
                yield relative, kind


def _hidden(name: str) -> str | None:
    hidden = name.startswith(".") or name in _LITTER
    return "hidden" if hidden else None


def _linked(place: str, name: str) -> str | None:
    return "linked folder" if os.path.islink(os.path.join(place, name)) else None


def _made_before(place: str, name: str) -> str | None:
    """Pages that another `prepare words` has made, or one of its shards."""
    stem = name.removesuffix("_pages")
    if stem == name:
        return None
    endings = (".jsonl.prepare.json", ".json.prepare.json", ".prepare.json")
    made = any(os.path.exists(os.path.join(place, stem + ending)) for ending in endings)
    if not made:
        shards = glob.escape(stem) + "-?????-of-?????*.prepare.json"
        made = any(Path(place).glob(shards))
    return "folder of pages made before" if made else None


def _judged(file: Path, root: Path) -> tuple[str | None, str]:
    """(kind, "") of an input, or (None, why it is none)."""
    if reason := _hidden(file.name):
        return None, reason
    try:
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            return None, "link that leads out of the folder"
        if not stat.S_ISREG(file.stat().st_mode):
            return None, "pipe, socket or device"
        kind = _kind(file)
    except (OSError, RuntimeError):  # a link to nothing, links in a circle, not permitted
        return None, "file that cannot be read"
    if kind in (*PICTURES, *DOCUMENTS, "image"):
        return kind, ""
    if kind is not None:
        return None, ADVICE[kind]
    return None, f"no image, {file.suffix.lower() or 'without extension'}"


def _kind(file: Path) -> str | None:
    """The kind by extension ("image"), else by content; see `file_kinds.kind_of`."""
    extension = file.suffix.lower()
    if extension in _known() and extension not in _NOT_PICTURES | _MAY_HAVE_PAGES:
        return "image"
    with file.open("rb") as stream:
        kind = kind_of(stream.read(HEAD))
    return kind or ("image" if extension in _MAY_HAVE_PAGES else None)


@cache
def _known() -> frozenset[str]:
    return frozenset(Image.registered_extensions())
