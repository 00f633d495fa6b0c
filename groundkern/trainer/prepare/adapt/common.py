"""What adapters share: their options, tables as inputs, and images that come inside a table."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import header_size, opened, wrong
from groundkern.trainer.places.writing import PER_MILLE, Writer
from groundkern.trainer.prepare.arguments import named
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.prepare.placing import Phrasing
from groundkern.trainer.prepare.sources import (
    TABLES,
    Item,
    Source,
    hugging_face,
    listed,
    table_rows,
)

_EXTENSIONS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "HEIF": ".heic",
    "AVIF": ".avif",
}
_ROWS = 16  # of a Parquet file in memory at a time


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare adapt` that decide what comes out.

    Args:
        data: file or folder of the annotations.
        images: folder of the images, if given.
        split, question, answer, ocr, unanswerable, points_in, overhang: as on the command line.
        writer: of `{box}` and `{point}`, by `--box-style` and `--model`.
        image_roots: further folders that images may be in, for absolute paths.
        take_chosen: of preferences, the chosen answers.
        boxes: what becomes of boxes that answers of chats write.
        output: folder of the output.
        folder: beside the output, for images that come inside a table.
        root: see `groundkern.trainer.prepare.adapt.work`; set once the inputs are open.
    """

    data: Path
    images: Path | None = None
    split: str | None = None
    question: str | None = None
    answer: str | None = None
    ocr: Path | None = None
    unanswerable: str | None = None
    points_in: str = "percent"
    overhang: float = 0.01
    writer: Writer = PER_MILLE
    image_roots: tuple[Path, ...] = ()
    take_chosen: bool = False
    boxes: BoxSettings = field(default_factory=BoxSettings)
    output: Path = Path()
    folder: str = "images"
    root: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Options:
        """The options of parsed arguments.

        Raises:
            ConfigError: a folder that is not there, or an overhang below 0.
        """
        paths = [(name, getattr(arguments, name)) for name in ("data", "images", "ocr")]
        paths += [("--image-root", path) for path in arguments.image_root]
        for name, path in paths:
            if path is not None and not (path.exists() if name == "data" else path.is_dir()):
                raise ConfigError(f"adapt: `{name}`: expected what is there, got {path}")
        if not arguments.overhang >= 0:
            raise ConfigError(f"adapt: `--overhang`: expected at least 0, got {arguments.overhang}")
        names = ("data", "images", "split", "question", "answer", "ocr", "unanswerable")
        given = named(arguments, *names, "points_in", "overhang", "take_chosen")
        chat = arguments.dataset == "chat"  # its answers are there, and keep their style
        style = None if chat else arguments.box_style
        return cls(
            **given,
            writer=Writer.of(style or PER_MILLE.style, arguments.model),
            image_roots=tuple(arguments.image_root),
            boxes=BoxSettings.of(arguments) if chat else BoxSettings(),
            output=arguments.output.parent,
            folder=f"{arguments.output.stem}_images",
        )

    def phrasing(self, default: Phrasing) -> Phrasing:
        """The question and answer asked for, else the data set's own."""
        question = default.question if self.question is None else self.question
        return Phrasing(question, default.answer if self.answer is None else self.answer)


def tables(options: Options) -> Source | None:
    """Rows of `save_to_disk` folders, of Parquet and Arrow files and folders; None: no such data.

    Parquet is read a few rows at a time and not through `datasets`, which would first copy it to
    its cache. A folder's Parquet files are named `<split>-...`, as on the hub.

    Raises:
        ConfigError: several splits and none chosen, or a package that is not installed.
    """
    path = options.data
    if path.suffix == ".parquet":
        return _parquet([path])
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if saved or path.suffix in TABLES:
        return hugging_face(path, split=options.split)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        return None
    splits = {file.stem.partition("-")[0] for file in files}
    split = splits.pop() if options.split is None and len(splits) == 1 else options.split
    chosen = [file for file in files if file.stem.partition("-")[0] == split]
    if not chosen:
        known = ", ".join(sorted({file.stem.partition("-")[0] for file in files}))
        raise ConfigError(f"{path}: expected --split, one of {known}, got {split}")
    return _parquet(chosen)


def _parquet(files: list[Path]) -> Source:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"{files[0]}: needs the package pyarrow (pip install pyarrow)") from None
    try:
        total = sum(ParquetFile(file).metadata.num_rows for file in files)
    except (OSError, ValueError, ArrowException) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{files[0].parent}: expected Parquet files ({why})") from None

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            table = ParquetFile(file, pre_buffer=False)  # else all of the file ends up in memory
            batches = table.iter_batches(batch_size=_ROWS)
            yield from table_rows(batches, file.name, table.metadata.num_rows)

    return replace(listed(read, files), total=total)


def other_answers(sample: dict[str, Any], texts: Iterable[Any]) -> dict[str, Any]:
    """The sample with those of `texts` that its answer is not, for evaluation.

    Args:
        sample: of one answer; `answers` is added if there are any.
        texts: right answers as a data set has them; what is no text is passed over.
    """
    said = sample["messages"][-1]["content"]
    found = dict.fromkeys(text.strip() for text in texts if isinstance(text, str))
    others = [text for text in found if text and text != said]
    return {**sample, "answers": others} if others else sample


@dataclass(frozen=True)
class Embedded:
    """An image that came inside a row: its path, its (width, height), what to write there."""

    path: str
    size: tuple[int, int]
    files: dict[str, bytes]


def embedded(row: dict, item: Item, options: Options) -> Embedded:
    """A row's `image`, which holds the encoded bytes; the size is after EXIF rotation.

    Raises:
        SampleError: no bytes, or not those of an image.
    """
    image = row.get("image")
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise wrong(item.where, "image", "the bytes of an image in the row", repr(image)[:80])
    extension, size = encoded(data, item.where, "image")
    name = f"{options.folder}/{item.index:08d}{extension}"
    return Embedded(name, size, {name: data})


def encoded(data: bytes, where: str, field: str) -> tuple[str, tuple[int, int]]:
    """(file extension, (width, height) after EXIF rotation) of an encoded image.

    Args:
        data: its bytes.
        where, field: what starts an error message.

    Raises:
        SampleError: not those of an image.
    """
    name, place = f"{len(data)} bytes", {"where": where, "field": field}
    with opened(io.BytesIO(data), name, **place) as picture:
        kind, size = picture.format, header_size(picture, name, **place)
    if kind not in _EXTENSIONS:
        raise wrong(where, field, f"one of {', '.join(_EXTENSIONS)}", kind)
    return _EXTENSIONS[kind], size
