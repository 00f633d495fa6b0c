"""A raw record of a stream to a checked sample: our format, or a chat of another program."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from groundkern.trainer.data.dataset import MAX_LINE, check_length
from groundkern.trainer.data.sample import Sample, decode_line, parse_sample
from groundkern.trainer.data.videos import RULES, VideoRules
from groundkern.trainer.prepare.adapt.chat import recognise
from groundkern.trainer.prepare.adapt.chat.files import first_records
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.adapt.work import Adapt
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.prepare.sources import Item
from groundkern.trainer.streaming.shards import Shards, refuse_unlike_json

_NUMBERS = count()  # of this process, for names of files


@dataclass(frozen=True)
class RecordReader:
    """Makes samples of the records of one source.

    Args:
        root: the folder of the images.
        max_pixels: that an image may have.
        parquet: records are pickled rows; else lines of JSON.
        chat: the work on records of another program; None: they are of our format.
        videos: which frames of a video are taken, and what it may be.
    """

    root: Path
    max_pixels: int
    parquet: bool
    chat: Adapt | None = None
    videos: VideoRules = RULES

    def sample(self, where: str, content: bytes) -> Sample:
        """The sample of a record, without its pixels.

        Raises:
            SampleError: one that cannot be used.
        """
        if self.parquet:
            value = pickle.loads(content)  # of `read_shards`
        else:
            check_length(content, where, MAX_LINE)
            value = content if self.chat is None else decode_line(content, where)
        if self.chat is not None:
            value = self._adapted(where, value)
        elif self.parquet:
            value = _given(value)
        limits = {"max_pixels": self.max_pixels, "videos": self.videos}
        return parse_sample(value, root=self.root, where=where, **limits)

    def forget(self, sample: Sample) -> None:
        """Remove the files of images that were inside the sample's record."""
        if self.chat is None:
            return
        scratch = os.path.realpath(self.chat.options.output)
        for image in sample.images:
            if os.path.dirname(os.path.dirname(image)) == scratch:
                image.unlink(missing_ok=True)

    def _adapted(self, where: str, value: Any) -> dict[str, Any]:
        """The canonical record of a chat; images inside it are written, for `forget` to remove."""
        options = self.chat.options
        # one folder for each process: numbers are its own
        work = replace(self.chat, options=replace(options, folder=str(os.getpid())))
        made = work(Item(next(_NUMBERS), where, value))
        for name, data in made.images.items():
            file = self.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return dict(made.samples[0])


def reader_of(
    shards: Shards,
    *,
    root: Path | None,
    image_roots: Sequence[Path],
    boxes: Callable[[], BoxSettings],
    max_pixels: int,
    videos: VideoRules = RULES,
    scratch: Path,
) -> RecordReader:
    """The reader of some files, by what their first records are.

    Args:
        shards: the files.
        root: the folder of their images; None: that of the files.
        image_roots, boxes, max_pixels: as of `groundkern.trainer.bringing.bring`.
        videos: which frames of a video are taken, and what it may be.
        scratch: a folder for images that are inside records, while these are used.

    Raises:
        ConfigError: preferences, or records of no known kind.
    """
    images, first = root or shards.base, shards.files[0]
    options = Options(first, images=images, image_roots=tuple(image_roots), output=scratch)
    records = first_records(options)
    if not records and not shards.parquet:
        refuse_unlike_json(first)
    if recognise.is_canonical(records):
        return RecordReader(images, max_pixels, shards.parquet, videos=videos)
    work = Adapt("chat", replace(options, boxes=boxes()))
    _, folder = work.inputs()
    print(f"{first}: read as {' and '.join(recognise.titles(records))}, record by record")
    return RecordReader(folder, max_pixels, shards.parquet, work.rooted(folder))


def _given(value: Any) -> Any:
    """A value without the nulls that Parquet has where a field is not given."""
    if isinstance(value, dict):
        return {name: _given(each) for name, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value
