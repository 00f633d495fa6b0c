"""Where visual tokens are, in every family: paint a spot, see which of the model's tokens change.

The real image processor runs on the painted image, and the model's own vision tower turns its
pixels into visual tokens. Attention is taken out of the tower, so a token changes exactly when its
own pixels do: tiles, global views, crops, pooling and newline tokens all show.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from benchmarks.families.seeing import fit_codes, process, visual_tokens
from groundkern.hf.data.geometry import image_geometry

SPOTS = 6  # painted per image


def spots_on(rects: torch.Tensor, size, generator) -> tuple[list[int], list[list[int]]]:
    """Some tokens, and the middle of each in pixels."""
    tokens, spots = [], []
    placed = (rects[:, 2] > rects[:, 0]).nonzero()[:, 0]
    for token in placed[torch.randperm(len(placed), generator=generator)].tolist():
        x0, y0, x1, y1 = rects[token].tolist()
        w, h = x1 - x0, y1 - y0
        spot = [round(x0 + 0.3 * w), round(y0 + 0.3 * h), round(x1 - 0.3 * w), round(y1 - 0.3 * h)]
        outside = min(spot) < 0 or spot[2] > size[0] or spot[3] > size[1]  # on the padding
        if not outside and len(spots) < SPOTS:
            tokens.append(token)
            spots.append(spot)
    return tokens, spots


def check(
    processor, model, size, generator, *, blur: float = 3.0, reach: float = 0.0
) -> torch.Tensor:
    """Compare the table of an image of `size` with what spots on it change.

    Args:
        processor, model: a family's.
        size: (width, height) in pixels.
        generator: chooses the spots.
        blur: pixels around a token's place that it may see by resampling.
        reach: the same by convolutions, in sizes of the place.

    Returns:
        The table.
    """
    blank = Image.new("RGB", size, "white")
    (table,) = image_geometry(processor, model.config, [[blank]], process(processor, [blank]))
    rects = table[:, 1:] * torch.tensor([*size, *size])
    tokens, spots = spots_on(rects, size, generator)
    assert tokens
    images = [blank.copy() for _ in spots]
    for image, spot in zip(images, spots):
        ImageDraw.Draw(image).rectangle((*spot[:2], spot[2] - 1, spot[3] - 1), fill="black")
    batch = process(processor, [blank, *images])
    if hasattr(model.base_model, "vocabulary_mapping"):  # images are codes of a vocabulary
        fit_codes(model, batch)
    seen = visual_tokens(model, batch)
    assert table.shape == (seen.shape[1], 5)
    around = blur + reach * (rects[:, 2:] - rects[:, :2])
    for token, spot, change in zip(tokens, spots, (seen[1:] - seen[0]).norm(dim=-1)):
        low, high = torch.tensor(spot[:2]), torch.tensor(spot[2:])
        near = ((rects[:, :2] - around < high) & (rects[:, 2:] + around > low)).all(1)
        assert (change[~near] <= 1e-4 * change.amax()).all(), (size, spot)
        assert change[token] > 0.1 * change.amax() > 0, (size, spot, token)
    return table


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
