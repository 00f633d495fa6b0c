"""What was found, in lines for the terminal and as a page with the visual tokens over the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from groundkern.hf import DoctorReport, Examination
from groundkern.hf.examination import OK
from groundkern.trainer import durable
from groundkern.trainer.pictures import page_uri, whole
from groundkern.trainer.templating import environment

STEPS = {
    "collator": "Collator",
    "attach": "Attach",
    "doctor": "Side tokens",
    "smam": "SMAM",
    "dv_sft": "DV-SFT",
    "klal": "KLAL",
    "hist": "HIST",
    "margins": "Margins",
    "logit_lens": "Logit lens",
    "basic": "BASIC",
    "patch_text": "Patch-text contrast",
    "packing": "Packed rows",
}
COLOURS = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5")  # of tokens, by their size


@dataclass
class Drawn:
    """An image with its visual tokens.

    Attributes:
        name: the image's.
        uri: the picture.
        width, height: of the picture.
        tokens: (colour, x, y, width, height, title) of those with a place.
        sizes: (colour, how many, their size in pixels of the image).
        placeless: how many have no place.
    """

    name: str
    uri: str
    width: int
    height: int
    tokens: list[tuple[str, float, float, float, float, str]]
    sizes: list[tuple[str, int, str]]
    placeless: int

    @classmethod
    def of(cls, name: str, image: Image.Image, table: Tensor) -> Drawn:
        """Draw one.

        Args:
            name: the image's.
            image: RGB.
            table: fp64 [C, 5] of the image's visual tokens.
        """
        shown = whole(image)
        rects = table[:, 1:]
        placed = rects[:, 2] > rects[:, 0]
        pixels = rects * torch.tensor([*image.size, *image.size])
        sizes = (pixels[:, 2:] - pixels[:, :2]).round().long()
        kinds = sizes[placed].unique(dim=0).tolist()
        kinds.sort(key=lambda size: -size[0] * size[1])
        colours = {tuple(k): COLOURS[i % len(COLOURS)] for i, k in enumerate(kinds)}
        scale = torch.tensor([*shown.size, *shown.size])
        tokens = []
        for number in placed.nonzero()[:, 0].tolist():
            x0, y0, x1, y1 = (rects[number] * scale).tolist()
            edges = ", ".join(f"{value:.0f}" for value in pixels[number].tolist())
            colour = colours[tuple(sizes[number].tolist())]
            tokens.append((colour, x0, y0, x1 - x0, y1 - y0, f"token {number}: {edges} px"))
        counted = [
            (colours[tuple(k)], int((sizes[placed] == torch.tensor(k)).all(1).sum()), k)
            for k in kinds
        ]
        sizes = [(colour, n, f"{k[0]} x {k[1]}") for colour, n, k in counted]
        drawn = page_uri(shown), *shown.size, tokens, sizes, int((~placed).sum())
        return cls(name, *drawn)

    def sentence(self) -> str:
        """How many visual tokens of which size."""
        sizes = ", ".join(f"{n} of {size} px" for _, n, size in self.sizes)
        without = f", {self.placeless} without a place" if self.placeless else ""
        return f"{self.name}: {len(self.tokens)} visual tokens with a place ({sizes}){without}"


@dataclass
class Findings:
    """Everything that the terminal and the page say."""

    path: str
    facts: list[tuple[str, str]]
    verdicts: list[tuple[str, str, str]]  # name, "ok" | "no" | "not tried", sentence
    images: list[Drawn]
    trainable: bool

    @classmethod
    def of(
        cls, path: str, model: nn.Module, found: Examination, images: dict[str, Image.Image]
    ) -> Findings:
        """Put what was found into words.

        Args:
            path: the model's folder.
            model: the model.
            found: of `examine`.
            images: by name.
        """
        config = model.config.get_text_config()
        facts = [
            ("model", f"{type(model).__name__} in {path}"),
            ("family", f"{model.config.model_type}, transformers {transformers.__version__}"),
            ("decoder", f"{config.num_hidden_layers} layers, {_attention(config)}"),
        ]
        sentences = {
            "collator": found.collator,
            "attach": found.attach,
            "doctor": found.doctor,
            **{name: found.objectives.get(name, "") for name in list(STEPS)[3:-1]},
            "packing": found.packing,
        }
        if found.report is not None:
            sentences["doctor"] += f": {_measured(found.report)}"
        verdicts = [(STEPS[name], *_verdict(said)) for name, said in sentences.items()]
        tables = found.tables or []
        drawn = [Drawn.of(n, i, t) for (n, i), t in zip(images.items(), tables)]
        return cls(path, facts, verdicts, drawn, found.trainable)

    def lines(self) -> list[tuple[str, str]]:
        """(name, sentence) for the terminal."""
        verdicts = [
            (name, said if word == OK else f"{word}: {said}") for name, word, said in self.verdicts
        ]
        return [*self.facts, *(("geometry", image.sentence()) for image in self.images), *verdicts]


def write(path: Path, findings: Findings) -> None:
    """Write the page.

    Raises:
        StorageError: the disk refuses.
    """
    page = environment().get_template("doctor.html").render(findings=findings)
    durable.write_text(path, page)


def _verdict(said: str) -> tuple[str, str]:
    """(word, sentence) of what a step says."""
    if not said:
        return "not tried", "an earlier step failed"
    return (OK, said) if said.startswith(OK) else ("no", said)


def _measured(report: DoctorReport) -> str:
    """What `doctor` measured, as a sentence."""
    told = f"main logits {report.main:.1e}"
    if report.of == "side tokens":
        told += f" and side logits {report.side:.1e}"
    told += f" of the largest logit apart (allowed: {report.tolerance:.0e})"
    if report.of == "attention":
        told += f", attention by the ops {report.side:.1e} of the largest output"
    if report.control is not None:
        told += f", {report.control:.1e} if a row sees itself only"
    return f"{told}; {report.rows} rows"


def _attention(config: Any) -> str:
    """The kinds of its layers."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    named = dict.fromkeys(kinds)
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in named)
