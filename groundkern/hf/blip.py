"""HIST in BLIP: phrases and subjects through the ITC and ITM heads, composition on GradCAM.

`BlipForImageTextRetrieval` is an encoder with cross-attention, not a decoder, so `attach` does not
apply: `blip_hist_batch` makes a batch and `blip_hist` its loss, in any training loop. The rows of
the maps are the text's tokens, the columns the image's patches, y is the matching logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundkern import attention_contribution
from groundkern.checks import fail, require
from groundkern.hf.data.concepts import composites
from groundkern.hf.data.example import GroundedExample, message_text
from groundkern.hf.data.pictures import upright_rgb
from groundkern.hf.data.texts import TextRules
from groundkern.losses import composition, contrastive, mean_rows
from groundkern.selection import QueryRows


@dataclass(frozen=True)
class BlipHist:
    """HIST in BLIP: phrase, subject and composition losses.

    BLIP's retrieval model has no masked-language head, so (H1) is ITC + ITM, like (H2).

    Args:
        phrase, subject, composition: the weights of (H4).
        temperature: by which ITC divides cosines.
        distance, detach_parts: of (H3), see `losses.composition`.
        layers: the text encoder's layers whose cross-attention maps are averaged; None: all. The
            last layer's is 0 everywhere, since the head reads the first token alone.
        backend: of `attention_contribution`.

    Source: HIST (arXiv 2412.08110), (H1)-(H4).
    """

    phrase: float = 1.0
    subject: float = 1.0
    composition: float = 1.0
    temperature: float = 0.07
    distance: str = "l2"
    detach_parts: bool = False
    layers: tuple[int, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("phrase", "subject", "composition"):
            value = getattr(self, name)
            require(0.0 <= value < float("inf"), name, "a finite number >= 0", value)
        require(self.temperature > 0, "temperature", "a number > 0", self.temperature)


class BlipHistOutput(NamedTuple):
    """Loss, its parts without their weights, and the map of every phrase."""

    loss: Tensor  # fp32 scalar
    parts: dict[str, Tensor]  # "phrase_itc", "phrase_itm", "subject_itc", ..., "composition"
    maps: Tensor | None  # [P, patches], differentiable; None without a composite


def blip_hist_batch(processor: Any, examples: Sequence[GroundedExample]) -> dict[str, Tensor]:
    """The phrases and subjects of samples of one image each, as BLIP's inputs.

    Args:
        processor: a `BlipProcessor`, its tokenizer a fast or slow one with special tokens.
        examples: each with exactly one image; `phrases` as in the canonical sample. A phrase that
            contains exactly two others is their composite.

    Returns:
        `pixel_values` [I, 3, h, w]; for `phrase_` and `subject_`: `input_ids`, `attention_mask`,
        `content` (1 on tokens that are not special) int64 [P, T] and `image` int64 [P];
        `composite` int64 [K, 3], numbers of a phrase and its two parts.

    Raises:
        ValueError: a sample with another number of images or one that cannot be used, a phrase with
            a special token of the tokenizer, or no phrase in the whole batch.
    """
    texts: dict[str, list[tuple[int, str]]] = {"phrase": [], "subject": []}
    three: list[list[int]] = []
    images: list[Any] = []
    rules = TextRules(processor.tokenizer)
    for number, example in enumerate(examples):
        example.check()
        name = example.name or "example"
        require(len(example.images) == 1, f"{name}: images", "one image", len(example.images))
        images.append(upright_rgb(example.images[0], f"{name}: images[0]"))
        first = len(texts["phrase"])
        three += [[first + i for i in found] for found in composites(example.phrases)]
        for index, phrase in enumerate(example.phrases):
            text = message_text(example.messages[phrase.turn])
            if token := rules.special(text[phrase.start : phrase.stop]):
                fail(f"{name}: phrases[{index}]", "text without special tokens", repr(token))
            texts["phrase"].append((number, text[phrase.start : phrase.stop].strip()))
            if phrase.subject is not None:
                texts["subject"].append((number, text[slice(*phrase.subject)].strip()))
    require(bool(texts["phrase"]), "examples", "at least one phrase", "none")
    batch = {"pixel_values": processor.image_processor(images, return_tensors="pt").pixel_values}
    for kind, found in texts.items():
        batch |= _tokens(processor.tokenizer, kind, found)
    return batch | {"composite": torch.tensor(three, dtype=torch.int64).reshape(-1, 3)}


def _tokens(tokenizer: Any, kind: str, texts: list[tuple[int, str]]) -> dict[str, Tensor]:
    if not texts:
        empty = torch.zeros(0, 1, dtype=torch.int64)
        names = ("input_ids", "attention_mask", "content")
        return {f"{kind}_{n}": empty for n in names} | {f"{kind}_image": empty[:, 0]}
    found = tokenizer(
        [text for _, text in texts],
        padding=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    mask = found["attention_mask"]
    return {
        f"{kind}_input_ids": found["input_ids"],
        f"{kind}_attention_mask": mask,
        f"{kind}_content": mask * (1 - found["special_tokens_mask"]),
        f"{kind}_image": torch.tensor([image for image, _ in texts]),
    }


def blip_hist(model: nn.Module, batch: dict[str, Tensor], how: BlipHist) -> BlipHistOutput:
    """(H4) of a batch. ITC and ITM compare within the batch, so they depend on how it is split.

    Args:
        model: a `BlipForImageTextRetrieval`.
        batch: of `blip_hist_batch`, on the model's device.
        how: weights and options.

    Returns:
        BlipHistOutput. Without gradients there are no maps and no "composition".

    Raises:
        TypeError: another model.
        ValueError: attention dropout in training, or layers that do not exist.

    Source: HIST (arXiv 2412.08110), (H1)-(H4); ITC and ITM as in BLIP (arXiv 2201.12086).
    """
    _check(model, how)
    image = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state  # [I, S, D]
    parts: dict[str, Tensor] = {}
    maps, zero = None, image.sum() * 0.0
    for kind in ("phrase", "subject"):
        text = _Texts(*(batch[f"{kind}_{n}"] for n in _Texts._fields))
        wanted = kind == "phrase" and len(batch["composite"]) > 0 and torch.is_grad_enabled()
        with _cross_attention(model, how.layers if wanted else ()) as saved:
            logits = _match(model, image[text.image], text)  # [P, 2]
        if wanted:
            maps = _gradcam(logits[:, 1].sum(), saved, text.content, how.backend)
        if len(text.image):
            similarity = _similarity(model, image, text) / how.temperature
            parts[f"{kind}_itc"] = contrastive(similarity, _matches(text, len(image)))
            parts[f"{kind}_itm"] = _itm(model, image, text, similarity.detach(), logits)
    if maps is not None:
        three = (maps[i] for i in batch["composite"].unbind(1))
        rows = composition(*three, distance=how.distance, detach_parts=how.detach_parts)
        parts["composition"] = mean_rows(rows)  # (H3)
    weights = {name: getattr(how, name.split("_")[0]) for name in parts}
    loss = sum((weights[name] * part for name, part in parts.items()), zero)  # (H4)
    return BlipHistOutput(loss, {name: part.detach() for name, part in parts.items()}, maps)


class _Texts(NamedTuple):
    input_ids: Tensor  # [P, T]
    attention_mask: Tensor  # [P, T]
    content: Tensor  # [P, T]
    image: Tensor  # [P]


class _CrossAttention(NamedTuple):
    q: Tensor  # [P, H, T, D]
    k: Tensor  # [P, H, S, D]
    v: Tensor  # [P, H, S, D]
    out: Tensor  # [P, T, H * D], what g is the gradient of


def _check(model: nn.Module, how: BlipHist) -> None:
    if type(model).__name__ != "BlipForImageTextRetrieval":
        fail("model", "a BlipForImageTextRetrieval", type(model).__name__, TypeError)
    dropout = model.config.text_config.attention_probs_dropout_prob
    require(not (model.training and dropout), "attention_probs_dropout_prob", "0", dropout)
    layers = len(model.text_encoder.encoder.layer)
    known = how.layers is None or (how.layers and all(0 <= n < layers for n in how.layers))
    require(bool(known), "layers", f"layers in [0, {layers}), or None", how.layers)


def _similarity(model: nn.Module, image: Tensor, text: _Texts) -> Tensor:
    """[I, P]: cosines of the projected first tokens, as the model's own ITC path computes them."""
    encoded = model.text_encoder(input_ids=text.input_ids, attention_mask=text.attention_mask)
    text_feature = F.normalize(model.text_proj(encoded.last_hidden_state[:, 0]), dim=-1)
    return F.normalize(model.vision_proj(image[:, 0]), dim=-1) @ text_feature.t()


def _matches(text: _Texts, images: int) -> Tensor:
    """bool [I, P]: an image matches its own texts and equal ones of other images."""
    own = torch.arange(images, device=text.image.device)[:, None] == text.image
    same = (text.input_ids[:, None] == text.input_ids).all(-1)  # [P, P]
    return (own.float() @ same.float()) > 0


def _match(model: nn.Module, image: Tensor, text: _Texts) -> Tensor:
    """[P, 2]: the ITM head on pairs of an image's tokens [P, S, D] and a text."""
    if len(image) == 0:
        return image.new_zeros(0, 2)
    encoded = model.text_encoder(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], device=image.device, dtype=torch.long),
    )
    return model.itm_head(encoded.last_hidden_state[:, 0])


def _itm(
    model: nn.Module, image: Tensor, text: _Texts, similarity: Tensor, positive: Tensor
) -> Tensor:
    """Matching loss of each pair against its hardest other image and its hardest other text."""
    match = _matches(text, len(image))
    apart = similarity.masked_fill(match, -torch.inf)  # [I, P]
    other_image = apart.argmax(0)  # [P]
    other_text = apart[text.image].argmax(1)  # [P]
    negative = [
        _match(model, image[other_image], text),
        _match(model, image[text.image], _Texts(*(x[other_text] for x in text))),
    ]
    exists = [(~match).any(0), (~match[text.image]).any(1)]
    logits = torch.cat([positive, *negative])
    label = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    label[: len(positive)] = 1
    counted = torch.cat([torch.ones_like(exists[0]), *exists])
    return mean_rows(F.cross_entropy(logits, label, reduction="none"), counted)


@contextmanager
def _cross_attention(
    model: nn.Module, layers: tuple[int, ...] | None
) -> Iterator[list[_CrossAttention]]:
    """A list to which the named layers append their cross-attention, in their graph; None: all."""
    saved: list[_CrossAttention] = []
    handles = []

    def watch(attention: nn.Module) -> None:
        seen: dict[str, Tensor] = {}

        def projected(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(
                _: nn.Module, __: Any, x: Tensor
            ) -> None:  # [P, length, H * D] -> [P, H, length, D]
                heads = x.unflatten(-1, (attention.num_attention_heads, -1))
                seen[name] = heads.transpose(1, 2)

            return hook

        for name in ("query", "key", "value"):
            module = getattr(attention, name)
            handles.append(module.register_forward_hook(projected(name)))

        def done(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            saved.append(_CrossAttention(seen["query"], seen["key"], seen["value"], output[0]))

        handles.append(attention.register_forward_hook(done))

    encoder = model.text_encoder.encoder.layer
    for number in range(len(encoder)) if layers is None else layers:
        watch(encoder[number].crossattention.self)
    try:
        yield saved
    finally:
        for handle in handles:
            handle.remove()


def _gradcam(y: Tensor, saved: list[_CrossAttention], content: Tensor, backend: str) -> Tensor:
    """[P, patches]: A * relu(dy/dA), the mean of content tokens, heads and layers (H3).

    The first image token is the class token: a key of the softmax, but not a column.
    """
    gradients = torch.autograd.grad(y, [layer.out for layer in saved], create_graph=True)
    (texts, length), keys = content.shape, saved[0].k.shape[2]
    sequence = torch.arange(texts, device=content.device).repeat_interleave(length).int()
    position = torch.arange(length, device=content.device).repeat(texts).int()
    stop = torch.where(content.flatten() > 0, keys, 0).int()
    columns = torch.arange(1, keys, device=content.device).expand(texts, -1).int()
    total: Tensor | float = 0.0
    for (q, k, v, _), g in zip(saved, gradients, strict=True):
        q, g = (x.flatten(0, 1) for x in (q.transpose(1, 2), g.unflatten(-1, (q.shape[1], -1))))
        rows = QueryRows(sequence, position, torch.zeros_like(stop), stop)
        total = total + attention_contribution(
            q, k, v, g, rows, columns.contiguous(), over="visible", rectify=True, backend=backend
        )
    maps = total.view(texts, length, -1) * content[..., None]
    heads = saved[0].q.shape[1]
    return maps.sum(1) / (content.sum(1, keepdim=True).clamp(min=1) * heads * len(saved))
