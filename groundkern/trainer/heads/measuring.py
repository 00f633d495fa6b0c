"""What every head's map is like on labelled samples: (K7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundkern import metrics
from groundkern.hf import GroundedExample
from groundkern.trainer.evaluation.grounding import Grounding
from groundkern.trainer.heads.entropy import neighbours, spatial_entropy
from groundkern.trainer.metrics.held_out import own_columns, target_columns, to_device
from groundkern.trainer.visual_places import VisualPlaces, visual_places

Figures = dict[str, NDArray]  # name: [L, H]; "chance": []


class Inputs(NamedTuple):
    """A batch on the CPU, and where its visual tokens are if it is asked for."""

    batch: dict[str, Tensor]
    places: VisualPlaces | None


class HeadMeasure:
    """Measures samples, as `groundkern.trainer.evaluation.work.figures` wants it.

    Args:
        grounding: of the model.
        entropy: measure spatial entropy too, which takes batches of one sample.
    """

    def __init__(self, grounding: Grounding, *, entropy: bool) -> None:
        self.grounding, self.entropy = grounding, entropy

    def inputs(self, examples: Sequence[GroundedExample]) -> Inputs:
        """The batch of some examples.

        Raises:
            ValueError: an example that the collator does not take, or without a map row.
        """
        batch = self.grounding.inputs(examples)
        for example, rows in zip(examples, batch["gk_map_position"] >= 0, strict=True):
            if not rows.any():
                wanted = "a region on a visual token, and an answer with a token"
                raise ValueError(f"{example.name}: expected {wanted}, got none")
        places = None
        if self.entropy:
            places = visual_places(self.grounding.collator, examples[0], batch)
        return Inputs(batch, places)

    @torch.no_grad()
    def measure(self, inputs: Inputs) -> list[Figures]:
        """The figures of each sample of a batch, means over its rows."""
        model = self.grounding.model
        batch = only_maps(to_device(inputs.batch, model.device))
        maps = model(**dict(batch), gk_record="heads").head_maps  # [B, R, L, H, C]
        targets, columns = target_columns(batch), own_columns(batch)
        rows = batch["gk_map_position"] >= 0
        found = []
        for b in range(len(rows)):
            of_rows = [
                figures_of(maps[b, r], targets[b, r], columns[b, r], inputs.places)
                for r in rows[b].nonzero()[:, 0].tolist()
            ]
            names = of_rows[0]
            found.append({name: np.mean([row[name] for row in of_rows], 0) for name in names})
        return found


def figures_of(maps: Tensor, target: Tensor, own: Tensor, places: VisualPlaces | None) -> Figures:
    """The figures of one row.

    Args:
        maps: [L, H, C] attention, normalised over all visible keys.
        target: bool [C], on the target.
        own: bool [C], of the row's image.
        places: where the first of the C are, for spatial entropy; None: it is not measured.

    Source: (K7).
    """
    layers, heads, _ = maps.shape
    flat = maps[..., own].flatten(0, 1)  # [L H, V]
    on = target[own].expand(flat.shape)
    found = {
        "share": metrics.mass_on_target(flat, on).nan_to_num(0.0),  # it sees no such token
        "hits": metrics.argmax_in_target(flat, on),
        "mass": flat.double().sum(-1),
    }
    shaped = {name: x.double().cpu().numpy() for name, x in found.items()}
    if places is not None:
        count = len(places.number)
        placed = places.placed & own[:count].cpu()
        pairs = neighbours(places.rects[placed].numpy(), places.times[placed].numpy())
        of_image = maps[..., :count].cpu()[..., placed].flatten(0, 1).double().numpy()
        shaped["entropy"] = spatial_entropy(of_image, pairs)
    shaped = {name: x.reshape(layers, heads) for name, x in shaped.items()}
    return {**shaped, "chance": on[0].double().mean().cpu().numpy()}


def only_maps(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without the supervision of other rows, which would be computed for nothing."""
    needed = ("gk_map_", "gk_image")
    return {k: v for k, v in batch.items() if not k.startswith("gk_") or k.startswith(needed)}
