"""Rows of a `datasets.Dataset` as examples: the fields of docs/data/data-format.md as columns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundkern.hf import GroundedExample
from groundkern.integrations.shared.records import supervision_of, without_nulls
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample

REFERENCES = ("path", "image", "url", "base64")  # keys of an image part in axolotl's messages


def root_of(root: Path | None, datasets: Any) -> Path:
    """The folder that image paths start from.

    Args:
        root: the one that was given.
        datasets: axolotl's entries of data sets.

    Returns:
        `root`, or the folder of the first data set if that is a file or folder, or the one that the
        program runs in.
    """
    folders = folders_of(datasets)
    return folders[0] if root is None else root


def folders_of(datasets: Any) -> list[Path]:
    """The folder of each data set, and where the program runs of those that are no files.

    Args:
        datasets: axolotl's entries of data sets; None: there are none.
    """
    found = []
    entries: Any = datasets or [{}]
    for entry in entries:
        given = entry.get("path") if isinstance(entry, dict) else getattr(entry, "path", None)
        path = Path(given or "")
        found.append(path.parent if path.is_file() else path if path.is_dir() else Path())
    return found


def example_of(row: Mapping[str, Any], *, root: Path, max_pixels: int) -> GroundedExample:
    """A row as an example, checked and with its images decoded.

    Columns that other rows have and this one has not are null in it, and count as not given.

    Args:
        row: with the fields of a sample as columns; an image may also be named by its part of a
            message (`{"type": "image", "path": ...}`), as in axolotl's own data.
        root: the folder that image paths start from.
        max_pixels: that an image may have.

    Returns:
        The example.

    Raises:
        SampleError: one sentence: the sample, the field, what was wanted, what came.
    """
    sample = without_nulls(row)
    where = _name(sample)
    sample |= supervision_of(row, where)
    images = [*sample.get("images", ()), *_take_references(sample, where)]
    sample["images"] = [_relative(path, root, where, i) for i, path in enumerate(images)]
    return parse_sample(sample, root=root, where=where, max_pixels=max_pixels).load()


def _name(sample: dict[str, Any]) -> str:
    """What errors call a sample, whose line in the file is not known here."""
    if "id" in sample:
        return f"sample {sample['id']!r}"
    return f"the sample with images {sample['images']}" if sample.get("images") else "a sample"


def _take_references(sample: dict[str, Any], where: str) -> list[str]:
    """The images that parts of messages name, which afterwards are parts without a name."""
    found = []
    for message in sample.get("messages", ()):
        for part in message.get("content", ()):
            if not isinstance(part, dict) or part.get("type") != "image":
                continue
            for key in REFERENCES:
                if key in part:
                    found.append(_local(part.pop(key), key, where))
    if found and sample.get("images"):
        wanted = "images in the column or in parts of messages, not in both"
        raise SampleError(f"{where}: `images`: expected {wanted}, got both")
    return found


def _local(reference: Any, key: str, where: str) -> str:
    remote = not isinstance(reference, str) or "://" in reference
    if key in ("path", "image", "url") and not remote:
        return reference
    raise SampleError(f"{where}: `{key}`: expected the path of a file, got {str(reference)[:80]!r}")


def _relative(path: Any, root: Path, where: str, index: int) -> str:
    """A path from the root on; one that leaves the root is refused by `parse_sample`."""
    if not isinstance(path, str):
        got = f"{type(path).__name__} (a column of decoded images?)"
        raise SampleError(f"{where}: `images[{index}]`: expected the path of a file, got {got}")
    if not os.path.isabs(path):
        return path
    inside = os.path.relpath(path, root.absolute())
    return path if inside.startswith("..") else inside
