"""The samples of a file as a data set for a trainer of one's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from groundkern.trainer.bringing import bring
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.scratch import temporary_folder


def load_samples(
    file: str | Path,
    *,
    root: str | Path | None = None,
    boxes: str = "auto",
    coord: str | None = None,
    model: str | None = None,
    folder: str | Path | None = None,
) -> JsonLinesDataset:
    """The samples of a file, each a `GroundedExample`, with images that are decoded on access.

    Bad samples are left out with a warning each; they are in the data set's `bad`.

    Args:
        file: JSON lines of docs/data/data-format.md, or the file that LLaMA-Factory, LLaVA, Qwen's
            scripts, ms-swift, TRL or axolotl train on (docs/data/bring-your-data.md).
        root: the folder that image paths are relative to; None: the file's.
        boxes: of a file of another program, boxes in answers that become regions: "auto" (those
            that say what their numbers count), "none", or a style of docs/data/boxes.md.
        coord: what numbers count that do not say so: "unit", "per_mille", "pixel", ...
        model: folder or hub name of the model whose processor such numbers are of; needed by
            styles in pixels of the resized image.
        folder: gets the samples made of a file of another program, which a second call finds again;
            None: a temporary folder that goes with the process.

    Returns:
        A data set with `len` and indexing, for a Trainer or a DataLoader.

    Raises:
        ConfigError: a file of no known format; settings of boxes that do not fit.
        SampleError: no usable sample.
        OSError: the file cannot be read.
    """
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"`file`: expected a file of samples, got {path} (not there)")
    brought = bring(
        path,
        root=None if root is None else Path(root),
        folder=Path(folder) if folder is not None else temporary_folder(),
        boxes=partial(BoxSettings.read_as, boxes, coord, model, prefix=""),
    )
    found = JsonLinesDataset(brought.path, root=brought.root, lost=brought.lost)
    if len(found) == 0:
        raise SampleError(f"{path}: no usable sample among {len(found.bad)}")
    return found
