"""The data of a command: a file of docs/data/data-format.md, or one that becomes one first.

A file of another fine-tuning program (`prepare adapt chat`) is converted once, into a folder of the
command's own, by the pipeline of the prepare commands: interrupted, it continues; unchanged, it is
used as it is; of a file that changed since it is made anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.bad_samples import BadSample
from groundkern.trainer.data.images import MAX_PIXELS
from groundkern.trainer.prepare.adapt.chat import recognise
from groundkern.trainer.prepare.adapt.chat.files import first_records, is_lines, unlike_json
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.adapt.work import Adapt
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.prepare.output import Output, made_with, rejected_lines
from groundkern.trainer.prepare.pipeline import prepare

logger = logging.getLogger(__name__)

SMALL = 64 * 2**20  # bytes of a file that one process converts


@dataclass(frozen=True)
class Brought:
    """Samples in the canonical format.

    Args:
        path: the JSON-lines file.
        root: the folder its image paths start from.
        lost: records of the original that could not be used.
    """

    path: Path
    root: Path
    lost: tuple[BadSample, ...] = ()


def bring(
    path: Path,
    *,
    root: Path | None,
    folder: Path,
    image_roots: Sequence[Path] = (),
    boxes: Callable[[], BoxSettings] = BoxSettings,
    on_bad_sample: Literal["skip", "stop"] = "skip",
    max_pixels: int = MAX_PIXELS,
    shown: bool = True,
) -> Brought:
    """The canonical samples of a file, converted below `folder` if they are not.

    Args:
        path: a file or folder that is there.
        root: the folder of the images; None: the file's.
        folder: for what is made of a file of another format.
        image_roots: further folders that absolute paths of images in such a file may lead to.
        boxes: makes the settings of boxes in answers of such a file, which may need a model.
        on_bad_sample: "stop" raises at the first record that cannot be used.
        max_pixels: that an image may have.
        shown: say what the file was read as.

    Raises:
        ConfigError: a file of no known format, or of preferences; settings of boxes that do not
            fit.
        SampleError: with "stop", the first bad record; a damaged file.
    """
    output = folder / f"{path.stem}.jsonl"
    options = Options(
        path,
        images=root,
        image_roots=tuple(image_roots),
        output=folder,
        folder=f"{path.stem}_images",
    )
    records = first_records(options)
    if path.is_file() and is_lines(path) and recognise.is_canonical(records):
        if not records and (what := unlike_json(path)) is not None:
            raise ConfigError(f"{path}: {what}")
        return Brought(path, root or path.parent)
    options = replace(options, boxes=boxes())
    work = Adapt("chat", options)
    source, images = work.inputs()
    settings: dict[str, Any] = {
        "command": f"read {path.name}",
        "root": None if root is None else os.path.abspath(root),
        "image_roots": [os.path.abspath(each) for each in image_roots],
        "max_pixels": max_pixels,
        "boxes": options.boxes.identity,
    }
    work = work.rooted(images)
    known = made_with(output, {**settings, "input": source.identity})
    if shown and not known:
        for sentence in work.warnings(source):
            logger.warning("%s", sentence)
    out = prepare(
        source,
        work,
        output=output,
        settings=settings,
        root=images,
        workers=1 if not path.is_file() or path.stat().st_size < SMALL else os.cpu_count() or 1,
        on_bad_sample=on_bad_sample,
        overwrite=not known,
        max_pixels=max_pixels,
        unit="record",
    )
    if shown:
        _say(path, records, out)
    return Brought(output, images, tuple(BadSample(*each) for each in rejected_lines(output)))


def _say(path: Path, records: list[Any], out: Output) -> None:
    titles = " and ".join(recognise.titles(records))
    print(
        f"{path}: read as {titles}: {out.samples:,} samples of {out.inputs:,} records, {out.path}"
    )
