"""The samples that `--data` names, as a data set."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from groundkern.trainer.bringing import bring
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.video_options import rules_of


def open_data(
    arguments: Namespace,
    processor: str,
    *,
    folder: Path,
    cache: Path | None = None,
    shown: bool = True,
) -> JsonLinesDataset:
    """The data set of a command line with the options of `command.add_subject`.

    Args:
        arguments: of the command line.
        processor: the folder or hub name of the model's, which knows what resized pixels are.
        folder: for what is made of a file of another program.
        cache: a folder that keeps what was found in the file; None: nothing is kept.
        shown: say what a file of another program was read as.

    Raises:
        ConfigError: no such file, or one of no known format.
        SampleError: no usable sample, or a bad one if bad samples stop the command.
    """
    path = arguments.data
    if not path.exists():
        raise ConfigError(f"--data: expected a JSON-lines file, got {path} (not there)")
    brought = bring(
        path,
        root=arguments.root,
        folder=folder,
        image_roots=arguments.image_root,
        boxes=partial(BoxSettings.read_as, arguments.boxes, arguments.coord, processor),
        on_bad_sample=arguments.on_bad_sample,
        shown=shown,
    )
    found = JsonLinesDataset(
        brought.path,
        root=brought.root,
        lost=brought.lost,
        on_bad_sample=arguments.on_bad_sample,
        videos=rules_of(arguments),
        cache=cache,
    )
    if len(found) == 0:
        raise SampleError(f"{path}: no usable sample among {len(found.bad)}")
    return found
