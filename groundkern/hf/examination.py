"""Everything that training does with a model, tried once: what works, and why the rest does not.

One step does not stop another where it need not: a model whose images have no known geometry is
still attached and examined on text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.checks import require
from groundkern.hf.data.collator import GroundingCollator
from groundkern.hf.data.example import GroundedExample, Phrase, Region, Word
from groundkern.hf.data.geometry import Geometry, image_geometry
from groundkern.hf.model.attach import attach, detach
from groundkern.hf.model.doctor import DoctorReport, doctor
from groundkern.hf.model.modes import training_mode
from groundkern.hf.model.prefix import CAUSAL_TYPE, is_prefix_lm
from groundkern.hf.model.support import base_model, packing_refusal, supported_objectives
from groundkern.hf.objectives import (
    Basic,
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    PatchText,
    Smam,
)
from groundkern.hf.packed import try_packing

OK = "ok"
ANSWER = "The red patch is in row 2 of the chart."
REGION = "red patch"
# each objective, and a part of the loss that it alone adds; no map meets a margin of 10
OBJECTIVES = {
    "smam": (Smam(), "smam_grounding"),
    "dv_sft": (DvSft(), "word"),
    "klal": (Klal(), "map_kl"),
    "hist": (Hist(), "composition"),
    "margins": (Margins(mean_margin=10.0), "margin_mean"),
    "logit_lens": (LogitLens(), "lens_raise"),
    "basic": (Basic(), "basic_direction"),
    "patch_text": (PatchText(), "patch_text"),
}
OPTIONS: dict[str, Any] = {
    "max_word_patches": 1e6,
    "lens": True,
    "contrast": True,
}  # a small image has large tokens
ROWS = {
    "gk_side_position": "aligned tokens",
    "gk_word_position": "labelled visual tokens",
    "gk_map_position": "map rows",
    "gk_contrast_position": "words' regions",
}


@dataclass
class Examination:
    """What was found, a sentence to a step: "ok", or why not; empty for one that was not reached.

    Args:
        collator: the examples became a batch in which every visual token has its place or none.
        attach: the wiring takes the model, whatever the objective.
        doctor: side tokens disturb nothing and see what they may (on a model without SMAM: the ops'
            attention is the model's own), measured on the batch; on text alone without a batch of
            images.
        objectives: by name: a loss with this objective alone is finite (and its gradient too, and
            not zero, if gradients were asked for).
        packing: samples in one row have the losses (and gradients, if these were asked for) that
            they have padded, with all objectives that work; on text alone without a batch of images
            `doctor` on a packed row.
        report: what `doctor` measured.
        tables: of each example, fp64 [C, 5] of its visual tokens' places; None without a batch.
        batch: what the collator made; None if it did not.
    """

    collator: str = ""
    attach: str = ""
    doctor: str = ""
    objectives: dict[str, str] = field(default_factory=dict)
    packing: str = ""
    report: DoctorReport | None = None
    tables: list[Tensor] | None = None
    batch: dict[str, Tensor] | None = None

    @property
    def trainable(self) -> bool:
        """Whether images and at least one objective work."""
        return self.collator == OK and OK in self.objectives.values()


def examine(
    model: nn.Module,
    processor: Any | None,
    images: Sequence[Any],
    *,
    geometry: Geometry | None = None,
    gradients: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Examination:
    """Try what training does, each objective by itself.

    Args:
        model: a transformers model that is not attached, bare or inside PEFT.
        processor: the model's; None: everything is tried on text alone.
        images: PIL images, one to a sample.
        geometry: as the collator takes it; None: the family's table.
        gradients: run every objective backwards too. This needs memory for the gradients of all
            parameters that are trained; those that were there are dropped.
        tell: is called with the name of each step that was tried, as it ends; steps that cannot be
            reached are not.

    Returns:
        What was found. An exception of any step is its reason; none is raised.
    """
    found, tell = Examination(), tell or (lambda name: None)
    if processor is not None:
        found.batch, found.collator = _tried(
            partial(_collated, found, processor, model, images, geometry)
        )
        tell("collator")
    _, found.attach = _tried(lambda: attach(model))
    tell("attach")
    if found.attach != OK:
        return found
    detach(model)
    device = next(model.parameters()).device
    batch = found.batch if found.batch is not None else text_batch(model)
    inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}
    found.report, found.doctor = _tried(partial(_doctored, model, inputs))
    tell("doctor")
    if found.batch is not None:
        run = _backward if gradients else _forward
        for name in OBJECTIVES:
            found.objectives[name] = _tried(partial(run, model, inputs, name))[1]
            tell(name)
    batches = partial(_text_batches, model)
    if found.batch is not None:
        batches = partial(_image_batches, processor, model, images, geometry)
    found.packing = _tried(partial(_packed, model, batches, found, gradients))[1]
    tell("packing")
    return found


def _tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns and "ok", or None and the first line of its error."""
    try:
        return make(), OK
    except Exception as error:  # whatever the code of a model raises is a finding
        lines = str(error).strip().split("\n")
        ours = isinstance(error, (ValueError, TypeError)) and lines[0].startswith("`")
        return None, lines[0] if ours else f"{type(error).__name__}: {lines[0]}"


def examples_of(images: Sequence[Any]) -> list[GroundedExample]:
    """A sample for each image, with something of every kind of supervision.

    Args:
        images: PIL images.
    """
    made = []
    spans = [("The red patch", (4, 7)), ("row 2", None), ("The red patch is in row 2", None)]
    for number, image in enumerate(images):
        start = ANSWER.index(REGION)
        region = Region(1, start, start + len(REGION), 0, boxes=((0.0, 0.0, 0.5, 0.5),))
        part = replace(region, start=start + len("red "), boxes=((0.5, 0.5, 1.0, 1.0),))
        words = [
            Word(text, (x, y, x + 0.2, y + 0.1), 0)
            for text, x, y in (("coal", 0.1, 0.1), ("chart", 0.6, 0.3), ("wife", 0.3, 0.8))
        ]
        phrases = [
            Phrase(1, at := ANSWER.index(text), at + len(text), subject) for text, subject in spans
        ]
        question = {"role": "user", "content": "Where is the red patch?"}
        chat = [question, {"role": "assistant", "content": ANSWER}]
        sample = (region, part), tuple(words), tuple(phrases)
        made.append(GroundedExample((image,), chat, *sample, name=f"image {number}"))
    return made


def _collated(
    found: Examination,
    processor: Any,
    model: nn.Module,
    images: Sequence[Any],
    geometry: Geometry | None,
) -> dict[str, Tensor]:
    """A batch in which there is something of every kind to learn."""
    place = geometry or partial(image_geometry, processor, model.config)

    def kept(images: Sequence[Sequence[Any]], features: Mapping[str, Any]) -> list[Tensor]:
        found.tables = place(images, features)
        return found.tables

    collator = GroundingCollator(processor, model.config, geometry=kept, **OPTIONS)
    batch = collator(examples_of(images))
    for rows, what in ROWS.items():
        there = bool((batch[rows] >= 0).any())
        require(there, "images", f"images on whose visual tokens there are {what}", "none")
    for ids, side in zip(batch["input_ids"], batch["gk_side_position"].tolist(), strict=True):
        aligned = [row + 1 for row in side if row >= 0]
        _require_region_text(processor.tokenizer.decode(ids[aligned]))
    return batch


def _require_region_text(found: str) -> None:
    """Raise unless aligned tokens say the region's text; one may reach beyond it in the answer."""
    text, whole, region = ("".join(x.split()).casefold() for x in (found, ANSWER, REGION))
    wanted = f"the tokens of {REGION!r} as aligned ones"
    require(region in text and text in whole, "gk_side_position", wanted, repr(found))


def text_batch(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences of text, the second shorter, with rows for `doctor`.

    Args:
        model: a transformers model.

    Returns:
        Keyword inputs of the model.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(20, min(vocabulary, 400), (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    rows = torch.tensor([[5, 8, 10], [4, 7, -1]], dtype=torch.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "gk_text_position": rows}
    if is_prefix_lm(base_model(model)):
        batch["token_type_ids"] = torch.full_like(ids, CAUSAL_TYPE)
    return batch


def _image_batches(
    processor: Any, model: nn.Module, images: Sequence[Any], geometry: Geometry | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The images and the first again, padded, and in rows that hold two: one of them is filled.

    The second image stands behind its question, so that the images of a row have different places.
    """
    examples = examples_of([*images, images[0]])
    question, *rest = examples[1].messages
    parts = [{"type": "text", "text": question["content"]}, {"type": "image"}]
    examples[1] = replace(examples[1], messages=[{**question, "content": parts}, *rest])
    options: dict[str, Any] = {"geometry": geometry, **OPTIONS}
    padded = GroundingCollator(processor, model.config, **options)(examples)
    two = int(padded["attention_mask"].sum(1).topk(2).values.sum())
    return padded, GroundingCollator(processor, model.config, pack_to=two, **options)(examples)


def _text_batches(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """`text_batch`, padded and in one row."""
    padded = text_batch(model)
    keep, rows = padded["attention_mask"].bool(), padded["gk_text_position"]
    first = int(keep[0].sum())
    moved = torch.where(rows[1] >= 0, rows[1] + first, -1)
    place = keep.long().cumsum(1) - 1
    packed = {name: x[keep][None] for name, x in padded.items() if x.shape == keep.shape}
    del packed["attention_mask"]
    rows = torch.cat((rows[0], moved))[None]
    return padded, {**packed, "position_ids": place[keep][None], "gk_text_position": rows}


def _packed(
    model: nn.Module,
    batches: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    found: Examination,
    gradients: bool,
) -> None:
    """Raise unless packed rows have the losses of padded ones."""
    if (reason := packing_refusal(model)) is not None:
        raise ValueError(reason)
    device = next(model.parameters()).device
    padded, packed = (
        {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}
        for batch in batches()
    )
    works = {n: how for n, (how, _) in OBJECTIVES.items() if found.objectives.get(n) == OK}
    try_packing(model, padded, packed, works, gradients=gradients)


def _doctored(model: nn.Module, inputs: dict[str, Tensor]) -> DoctorReport:
    passed = supported_objectives(model)["smam"] is None
    attach(model, smam=Smam() if passed else None)
    try:
        return doctor(model, inputs)
    finally:
        detach(model)


def _forward(model: nn.Module, inputs: dict[str, Tensor], name: str) -> None:
    """Raise unless an objective's part of the loss is finite."""
    with torch.no_grad():
        _loss_of(model, inputs, name)


def _backward(model: nn.Module, inputs: dict[str, Tensor], name: str) -> None:
    """Raise unless an objective's part and its gradient are finite, and the gradient not zero."""
    model.zero_grad()
    try:
        _loss_of(model, inputs, name).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(grad).all()) for grad in grads)
        require(finite, name, "a finite gradient", "NaN or infinity")
        nonzero = any(bool(grad.any()) for grad in grads)
        require(nonzero, name, "a gradient", "zeros everywhere")
    finally:
        model.zero_grad()


def _loss_of(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Tensor:
    """An objective's part of the loss, in training mode."""
    objective, part = OBJECTIVES[name]
    only: dict[str, Any] = {name: objective}
    attach(model, **only)
    try:
        with training_mode(model):
            loss = model(**inputs, gk_part=part).loss
    finally:
        detach(model)
    require(bool(torch.isfinite(loss)), name, "a finite loss", loss.item())
    return loss
