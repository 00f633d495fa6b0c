"""What a model is given of images: its visual tokens, alone and without what mixes their places.

The real processor runs, and the model's own vision tower up to the decoder. Without attention, and
without the neighbours of convolutions, a token changes exactly when its own pixels do.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature

from groundkern.hf.data.calling import call, rendered


class _Reached(Exception):
    """The model's decoder was reached."""


def without_attention(model: nn.Module) -> nn.Module:
    """The model with attention (and, in LFM3-VL, convolutions over patches) that adds nothing, but
    for its decoder's. What pools each token's own patches (Molmo2) takes their mean."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        around = any(map(_mixes, list(module.modules())[1:]))  # also adds what it was given
        if not _mixes(module) or around or id(module) in decoder:
            continue
        if "pool" in name.rpartition(".")[2]:
            for parameter in module.q_proj.parameters():
                nn.init.zeros_(parameter)
        else:
            module.register_forward_hook(lambda module, args, output: _zeros(output))
    return model


def _mixes(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Attention", "AttentionRope", "ShortConv"))


def _zeros(output):
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return torch.zeros_like(output[0]), *output[1:]


def without_neighbours(model: nn.Module) -> nn.Module:
    """The model with convolutions that see nothing outside their own cell, and norms of one place.

    A convolution of kernel k and stride s keeps the s taps of its cell: the middle one if s is 1.
    A group norm, which is over all places of an image, becomes one over the channels of a place.
    Attention blocks among them add nothing. Biases go, beside which the taps that are left would be
    small.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            kept = torch.zeros(module.kernel_size[-2:])  # every frame of three dimensions
            padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
            own = zip(module.kernel_size[-2:], module.stride[-2:], padding[-2:])
            starts = ((pad if s > 1 else (k - 1) // 2, s) for k, s, pad in own)
            kept[tuple(slice(start, start + s) for start, s in starts)] = 1.0
            with torch.no_grad():
                module.weight.mul_(kept * (kept.numel() / kept.sum()))
                if module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.forward = _norm_of_a_place
        elif type(module).__name__.endswith(("AttnBlock", "AttentionBlock")):
            last = getattr(module, "proj_out", getattr(module, "out_proj", nn.Identity()))
            for parameter in last.parameters():  # timm's block has what is named attention within
                nn.init.zeros_(parameter)
    return model


def _norm_of_a_place(x: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


@torch.no_grad()
def fit_codes(model: nn.Module, batch: dict) -> None:
    """Give every look of a patch its code: of random codes one would be the nearest to all.

    The first place of the batch has the look that most places have.
    """
    quantize, seen = model.base_model.vqmodel.quantize, []
    hook = quantize.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    hook.remove()
    features = seen[0].movedim(-3, -1).flatten(0, -2)
    distance = (features - features[0]).norm(dim=1)
    step = 1e-3 * distance.amax()  # places that look alike differ by rounding
    others = (features[distance > step] / step).round().unique(dim=0) * step
    codes = quantize.embedding.weight
    assert 0 < len(others) < len(codes)
    codes[0] = features[0]
    codes[1:] = others[torch.arange(len(codes) - 1) % len(others)]


def process(processor, images: list[Image.Image], *, each: int = 1) -> dict:
    """One sequence to every `each` images, with text around and between them."""
    part = {"type": "text", "text": "and"}
    content = [part, *([{"type": "image"}, part] * each)]
    text = rendered(processor, [{"role": "user", "content": content}])
    nested = [images[i : i + each] for i in range(0, len(images), each)]
    features = call(processor, nested, [text] * len(nested), padding=True)
    for per_character in ("offset_mapping", "text_replacement_offsets"):
        features.pop(per_character, None)
    lists = getattr(processor, "skip_tensor_conversion", None)
    return BatchFeature(features).convert_to_tensors("pt", lists).data


@torch.no_grad()
def visual_tokens(model: nn.Module, batch: dict, token: int | None = None) -> torch.Tensor:
    """[B, n, D]: what the model puts in the place of the tokens `token`, by default those of
    images; its layers do not run.

    Read before the first layer, where Granite's features enter; or before the decoder, whose
    layers may have several streams (Gemma3n).
    """
    seen = []

    def before_decoder(module: nn.Module, args: tuple, inputs: dict) -> None:
        seen.append(inputs.get("inputs_embeds"))  # none: it is the body, with its tower

    def before_layer(module: nn.Module, args: tuple, inputs: dict) -> None:
        hidden = args[0] if args else inputs["hidden_states"]
        if seen[0] is None or hidden.shape == seen[0].shape:
            seen[0] = hidden
        raise _Reached

    decoder = model.get_decoder()
    first = getattr(decoder, "model", decoder).layers[0]  # Nemotron-H's is a model with a head
    places = {decoder: before_decoder, first: before_layer}
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in places.items()]
    with suppress(_Reached):
        pixels = batch.get("pixel_values")
        model(**batch if pixels is None else batch | {"pixel_values": pixels.to(model.dtype)})
    for hook in hooks:
        hook.remove()
    at = batch["input_ids"] == (model.config.image_token_id if token is None else token)
    return seen[0][at].flatten(1).unflatten(0, (len(at), -1))  # some have several streams
