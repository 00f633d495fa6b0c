"""Where visual tokens are, in every family: paint a spot, see which of the model's tokens change.

The real image processor runs on the painted image, and the model's own vision tower turns its
pixels into visual tokens. Attention is taken out of the tower, so a token changes exactly when its
own pixels do: tiles, global views, crops, pooling and newline tokens all show.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from PIL import Image, ImageDraw
from torch import nn

from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.processor import text_options

SPOTS = 6  # painted per image


class _Reached(Exception):
    """The model's decoder was reached."""


def without_attention(model: nn.Module) -> nn.Module:
    """The model with attention (and, in LFM3-VL, convolutions over patches) that adds nothing, but
    for its decoder's."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    for module in model.modules():
        mixes = type(module).__name__.endswith(("Attention", "ShortConv"))
        if mixes and id(module) not in decoder:
            module.register_forward_hook(lambda module, args, output: _zeros(output))
    return model


def _zeros(output):
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return torch.zeros_like(output[0]), *output[1:]


def process(processor, images: list[Image.Image], *, each: int = 1) -> dict:
    """One sequence to every `each` images, with text around and between them."""
    part = {"type": "text", "text": "and"}
    content = [part, *([{"type": "image"}, part] * each)]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    nested = [images[i : i + each] for i in range(0, len(images), each)]
    return processor(
        text=[text] * len(nested),
        images=nested,
        return_tensors="pt",
        padding=True,
        **text_options(processor, text),
    )


@torch.no_grad()
def visual_tokens(model: nn.Module, batch: dict) -> torch.Tensor:
    """[B, n, D]: what the model puts in the place of the image tokens; its decoder does not run."""
    seen = []

    def keep(module: nn.Module, args: tuple, inputs: dict) -> None:
        seen.append(inputs["inputs_embeds"])
        raise _Reached

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with suppress(_Reached):
        model(**batch)
    hook.remove()
    at = batch["input_ids"] == model.config.image_token_id
    return seen[0][at].flatten(1).unflatten(0, (len(at), -1))  # some have several streams


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


def check(processor, model, size, generator, *, blur: float = 3.0) -> torch.Tensor:
    """Compare the table of an image of `size` with what spots on it change; returns the table."""
    blank = Image.new("RGB", size, "white")
    (table,) = image_geometry(processor, model.config, [[blank]], process(processor, [blank]))
    rects = table[:, 1:] * torch.tensor([*size, *size])
    tokens, spots = spots_on(rects, size, generator)
    assert tokens
    images = [blank.copy() for _ in spots]
    for image, spot in zip(images, spots):
        ImageDraw.Draw(image).rectangle((*spot[:2], spot[2] - 1, spot[3] - 1), fill="black")
    seen = visual_tokens(model, process(processor, [blank, *images]))
    assert table.shape == (seen.shape[1], 5)
    for token, spot, change in zip(tokens, spots, (seen[1:] - seen[0]).norm(dim=-1)):
        low, high = torch.tensor(spot[:2]), torch.tensor(spot[2:])
        near = ((rects[:, :2] - blur < high) & (rects[:, 2:] + blur > low)).all(1)  # resampling
        assert (change[~near] <= 1e-4 * change.amax()).all(), (size, spot)
        assert change[token] > 0.1 * change.amax() > 0, (size, spot, token)
    return table


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
