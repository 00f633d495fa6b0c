"""Where a model's processor puts its visual tokens; needs no weights."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from groundkern.hf.data.calling import sample
from groundkern.hf.data.geometry import image_geometry  # not by way of hf: no Trainer here
from groundkern.hf.data.image_token import image_token_id
from groundkern.hf.data.processor import load_processor
from groundkern.maps import patch_grid
from groundkern.trainer.config import ConfigError

Size = tuple[int, int]
PATCH = 14  # pixels, if a processor does not say


class VisualGrid:
    """The processor and the config of a model folder, and the table of visual tokens they give.

    Args:
        path: folder with config.json, the processor and the tokenizer.

    Raises:
        ConfigError: they cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.processor: Any = load_processor(path, local_files_only=True)
            self.config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path}: expected a model's processor and config ({reason})"
            ) from None
        self.table = lru_cache(maxsize=256)(self._table)

    @property
    def cell(self) -> int:
        """Pixels of a visual token of an image that is not resized, as far as settings tell."""
        images = self.processor.image_processor
        sizes = (getattr(holder, "patch_size", None) for holder in (images, self.processor))
        patch = next((size for size in sizes if isinstance(size, int)), PATCH)
        return patch * getattr(images, "merge_size", 1)

    def aligned(self, cell: int, columns: int, rows: int) -> bool:
        """Whether an image of columns x rows cells gets just these as its visual tokens."""
        try:
            table = self.table((columns * cell, rows * cell))
        except ValueError:
            return False
        wanted = patch_grid(rows, columns)
        return table.shape[0] == len(wanted) and torch.allclose(table[:, 1:], wanted, atol=1e-9)

    def _table(self, *sizes: Size) -> Tensor:
        """[n, 5] of `image_geometry` for a sample with images of these (width, height).

        Raises:
            ValueError: the processor does not take such an image.
        """
        images = [Image.new("RGB", size) for size in sizes]
        batch = sample(self.processor, images)
        table = image_geometry(self.processor, self.config, [images], batch)[0]
        visual = image_token_id(self.config, self.processor)
        tokens = int((batch["input_ids"] == visual).sum())
        if tokens != len(table):
            raise ValueError(f"{tokens} visual tokens where the geometry has {len(table)}")
        return table


@cache
def visual_grid(path: Path) -> VisualGrid:
    """`VisualGrid`, loaded once per process."""
    return VisualGrid(path)
