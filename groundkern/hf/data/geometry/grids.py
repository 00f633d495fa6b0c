"""Families whose processor tells the grid over which it stretched each image."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.geometry.views import Views
from groundkern.maps import patch_grid


def stretched(views: Views) -> list[Tensor]:
    """Qwen: a grid of merged patches, its size from `image_grid_thw`."""
    merge_size = views.processor.image_processor.merge_size
    grids = views.batch.get("image_grid_thw", ())
    tables = []
    for time, height, width in torch.as_tensor(grids).reshape(-1, 3).tolist():
        require(time == 1, "image_grid_thw", "still images (t = 1)", f"t = {time}")
        tables.append(patch_grid(height // merge_size, width // merge_size))
    return tables
