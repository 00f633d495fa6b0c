"""What works with one family: every step that a user's training takes, "ok" or the reason why not.

The steps do not stop one another where they need not: a model whose images have no known geometry
is still attached and examined on text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.families.zoo.making import Family
from groundkern.hf import (
    DvSft,
    GroundedExample,
    GroundingCollator,
    Klal,
    Region,
    Smam,
    Word,
    attach,
    detach,
    doctor,
)

OK = "ok"
SIZES = ((150, 97), (61, 170))  # of the two images, in pixels
ANSWER = "The red patch is in row 2."
# each objective, and the part of the loss that it adds
OBJECTIVES = {
    "smam": (Smam, "smam_grounding"),
    "dv_sft": (DvSft, "word"),
    "klal": (Klal, "map_kl"),
}


@dataclass
class Findings:
    """One sentence for each step: "ok", or why not; empty for a step that was not reached.

    Args:
        build: a tiny model (and processor, if the family has one).
        collator: two samples of one image each became a batch with a place for every visual token.
        attach: the wiring took the model, with SMAM, DV-SFT and KLAL together.
        doctor: what `doctor` measured on the batch held; on text alone without a batch of images.
        smam, dv_sft, klal: a loss with this objective alone is finite, and its gradient too and
            not zero.
    """

    build: str = ""
    collator: str = ""
    attach: str = ""
    doctor: str = ""
    smam: str = ""
    dv_sft: str = ""
    klal: str = ""

    @property
    def trainable(self) -> bool:
        """With images and at least one objective."""
        return self.collator == OK and OK in (self.smam, self.dv_sft, self.klal)


def examine(family: Family) -> Findings:
    """Try everything on a family.

    Args:
        family: of the zoo.

    Returns:
        What was found.
    """
    found = Findings()
    model, found.build = _tried(family.model)
    if model is None:
        return found
    processor = None
    if family.processor is not None:
        processor, found.build = _tried(family.processor)
    batch = None
    if processor is not None:
        batch, found.collator = _tried(lambda: collated(processor, model.config))
    inputs = text_batch(model) if batch is None else batch
    attached = {name: objective() for name, (objective, _) in OBJECTIVES.items()}
    _, found.attach = _tried(lambda: attach(model, **attached))
    if found.attach == OK:
        _, found.doctor = _tried(lambda: doctor(model, inputs))
        detach(model)
    if batch is not None:
        for name in OBJECTIVES:
            setattr(found, name, _tried(partial(step, model, batch, name))[1])
    return found


def _tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` returns and "ok", or None and the first line of its error."""
    try:
        return make(), OK
    except Exception as error:  # whatever a family's code raises is a finding
        lines = str(error).strip().split("\n")
        return None, f"{type(error).__name__}: {lines[0]}"


def examples() -> list[GroundedExample]:
    """Two samples of one image each, with a region of two words and three printed words."""
    made = []
    for number, size in enumerate(SIZES):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((8, 8, size[0] // 2, size[1] // 2), fill="red")
        start = ANSWER.index("red patch")
        region = Region(1, start, start + len("red patch"), 0, boxes=((0.0, 0.0, 0.5, 0.5),))
        words = [
            Word(text, (x, y, x + 0.2, y + 0.1), 0)
            for text, x, y in (("coal", 0.1, 0.1), ("chart", 0.6, 0.3), ("wife", 0.3, 0.8))
        ]
        question = {"role": "user", "content": "Where is the red patch?"}
        chat = [question, {"role": "assistant", "content": ANSWER}]
        made.append(GroundedExample((image,), chat, (region,), tuple(words), name=f"{number}"))
    return made


def collated(processor: Any, config: Any) -> dict[str, Tensor]:
    """A batch of `examples`; words of any height count, because tiny models have large tokens."""
    collator = GroundingCollator(processor, config, max_word_patches=1e6)
    batch = collator(examples())
    for rows in ("gk_side_position", "gk_word_position", "gk_map_position"):
        if not bool((batch[rows] >= 0).any()):
            raise ValueError(f"no {rows}: the samples' regions and words met no visual token")
    return batch


def text_batch(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences of text, the second shorter, with rows for doctor."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(20, min(vocabulary, 400), (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    rows = torch.tensor([[5, 8, 10], [4, 7, -1]], dtype=torch.int32)
    return {"input_ids": ids, "attention_mask": mask, "gk_text_position": rows}


def step(model: nn.Module, batch: dict[str, Tensor], name: str) -> float:
    """One forward and backward with an objective alone, of its own part of the loss.

    Args:
        model: not attached.
        batch: of `collated`.
        name: of the objective, one of OBJECTIVES.

    Returns:
        That part of the loss.

    Raises:
        ValueError: it is not finite, or its gradient is not or is zero everywhere.
    """
    objective, part = OBJECTIVES[name]
    attach(model, **{name: objective()})
    try:
        model.train()
        model.zero_grad()
        loss = model(**batch, gk_part=part).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {loss.item()}")
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            raise ValueError("a gradient is not finite")
        if not any(bool(grad.any()) for grad in grads):
            raise ValueError("the gradient is zero everywhere")
        return loss.item()
    finally:
        model.eval()
        detach(model)


def row(found: Findings) -> list[str]:
    """The sentences in the order of the columns."""
    return [getattr(found, field.name) for field in fields(Findings)]
