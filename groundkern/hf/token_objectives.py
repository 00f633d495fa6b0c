"""What visual tokens are trained to be: objectives as in `objectives`, which has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundkern.hf.checked import MOST_LAYERS, Checked
from groundkern.messages import require


@dataclass(frozen=True)
class Basic(Checked):
    """BASIC: visual tokens as they enter the decoder are taught by what its first layers make of
    them; no labels.

    Args:
        direction: weight of (B2), the distance between directions.
        logits: weight of (B3), the divergence over the vocabulary; 0: not computed.
        depth: k of (B1), the layers whose outputs make the teacher; null: half of all.
        patches: how much a visual token counts: its mean "attention" from the text tokens, over
            heads and the first k layers; or "uniform", all tokens of an image alike, 1 in all.
        head: E of (B3): the "input" embeddings of tokens or the weight of the "output" head.
        detach_head: no gradient reaches E through (B3).

    Source:
        (B1)-(B3) of docs/methods/basic.md.
    """

    direction: float = 1.0
    logits: float = 0.01
    depth: int | None = None
    patches: Literal["attention", "uniform"] = "attention"
    head: Literal["input", "output"] = "input"
    detach_head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        few = self.depth is None or 1 <= self.depth < MOST_LAYERS
        require(few, "depth", "a number of layers, at least 1, or None", self.depth)


@dataclass(frozen=True)
class PatchText(Checked):
    """Patch-text contrast: a visual token on a region says that region's word rather than the other
    words of its image that have one.

    Args:
        weight: of (B4), the mean over visual tokens on regions.
        words: weight of (B5), where each word is found among the visual tokens of its image.
        temperature: tau of both, above 0.

    Source:
        (B4), (B5) of docs/methods/patch-text.md.
    """

    weight: float = 1.0
    words: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", "a number above 0", self.temperature)
