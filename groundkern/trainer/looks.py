"""What a model looks at for each token of an answer: maps over an image, or over a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from groundkern import metrics
from groundkern.hf import GroundedExample, GroundingCollator, Video, attach
from groundkern.trainer.geometry import geometry_of
from groundkern.trainer.metrics.held_out import to_device
from groundkern.trainer.visual_places import visual_places

MAPS = ("attention", "gradcam", "contribution")


@dataclass(frozen=True)
class Looks:
    """What a model looked at for each token of an answer.

    Args:
        tokens: the tokens' texts.
        log_prob: [R] log probability of each.
        rects: [C, 4] places of the visual tokens that have one, in fractions of the image.
        maps: [R, L, C] by name of MAPS.
        times: [C, 2] of a video's tokens, the seconds from which and up to which each shows it.
    """

    tokens: list[str]
    log_prob: Tensor
    rects: Tensor
    maps: dict[str, Tensor]
    times: Tensor | None = None

    def over(self, name: str, tokens: list[int], layers: list[int]) -> Tensor:
        """[C]: mean over tokens; mean (attention) or sum (the others) over layers."""
        chosen = self.maps[name][tokens][:, layers].mean(0)
        return chosen.mean(0) if name == "attention" else chosen.sum(0)


@torch.no_grad()
def look(
    model: torch.nn.Module, processor: Any, seen: Image.Image | Video, prompt: str, answer: str
) -> Looks:
    """Read the maps of every token of an answer, in one run of the model.

    Args:
        model: in eval mode; gets attached.
        processor: the model's.
        seen: an RGB image, or a video.
        prompt, answer: what the user asks and the assistant says.

    Raises:
        ValueError: a family or a model that is not supported, by name.
    """
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    films = (seen,) if isinstance(seen, Video) else ()
    example = GroundedExample(() if films else (seen,), messages, videos=films)
    geometry = geometry_of(model, processor)
    collator = GroundingCollator(processor, model.config, geometry=geometry)
    batch = collator([example])
    places = visual_places(collator, example, batch)
    batch = to_device(_every_token(batch), model.device)
    output = attach(model)(**batch, gk_record=("maps", "gradcam", "contributions", "layers"))
    placed = places.placed
    found = (output.maps, output.gradcam, output.contributions)
    rows = batch["gk_text_position"][0]
    predicted = batch["input_ids"][0, rows.long() + 1]
    return Looks(
        [processor.tokenizer.decode([token]) for token in predicted.tolist()],
        output.text_log_prob[0].float().cpu(),
        places.rects[placed],
        {name: x[0].float().cpu()[..., placed] for name, x in zip(MAPS, found)},
        places.times[placed] if films else None,
    )


def _every_token(batch: dict) -> dict:
    """The batch with a side row and a map row for each trained token."""
    rows, columns = batch["gk_text_position"], batch["gk_map_columns"]
    nothing = torch.zeros_like(rows)
    replaced = ("gk_word", "gk_several", "gk_query", "gk_side_weight", "gk_map_weight")
    return {
        **{name: x for name, x in batch.items() if not name.startswith(replaced)},
        "gk_side_position": rows,
        "gk_side_set": nothing - 1,
        "gk_side_inside": torch.zeros(1, 0, batch["input_ids"].shape[1], dtype=torch.bool),
        "gk_map_position": rows,
        "gk_map_token_position": torch.where(rows >= 0, rows + 1, -1),
        "gk_map_image": nothing,
        "gk_map_target": columns[:, None].expand(-1, rows.shape[1], -1) * 0,
    }


def scores(values: Tensor, name: str, on: Tensor) -> dict[str, float]:
    """How well a map [C] finds the tokens `on`; the ratio is for maps that are never negative."""
    target = on[None]
    found = {
        "peak": metrics.peak_in_mask(values[None], target),
        "AUC": metrics.roc_auc(values[None], target),
    }
    if name != "contribution":
        found["ratio"] = metrics.attention_ratio(values[None], target)
    return {key: float(value) for key, value in found.items()}
