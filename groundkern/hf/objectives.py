"""What to train beside the text loss: one frozen dataclass per method, with the papers' weights.

`trainer.config` validates these same classes with pydantic; its `--help` shows the Args of each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from groundkern.messages import fail, require

LARGEST, MOST_LAYERS = 1e9, 10_000  # above these a number is a slip
Maps = Literal["attention", "gradcam"]
Layers = tuple[int, ...] | None


class _Checked:
    """Checks the fields of a dataclass by their types; every float is a weight or a margin."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            kind, value = kinds[name], getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                fail(name, " or ".join(get_args(kind)), value)
            if kind is float:
                require(0.0 <= value <= LARGEST, name, f"a number in [0, {LARGEST:g}]", value)
            if kind == Layers and value is not None:
                ascending = bool(value) and list(value) == sorted(set(value))
                ascending = ascending and value[0] >= 0 and value[-1] < MOST_LAYERS
                wanted = "distinct layer numbers in ascending order, or None"
                require(ascending, name, wanted, value)


@dataclass(frozen=True)
class Smam(_Checked):
    """SMAM / PGA-SFT: `weight * (gamma * L_G + alpha * L_CE+)`.

    Args:
        weight: factor on both terms.
        beta: slope of the grounding loss (S4).
        alpha: weight of the masked cross entropy (S5).
        gamma: weight of the grounding loss (S5); the paper: 2.0 for LLaVA, 0.5 for Qwen.
        detach_reference: no gradient through the masked pass pi+ in (S4).
        divide_by: the sum of (S5) is divided by the "text" loss's own denominator, or by the number
            of "aligned" rows.

    Source:
        (S1)-(S5) of docs/methods.md.
    """

    weight: float = 1.0
    beta: float = 0.1
    alpha: float = 0.1
    gamma: float = 2.0
    detach_reference: bool = False
    divide_by: Literal["text", "aligned"] = "text"


@dataclass(frozen=True)
class DvSft(_Checked):
    """DV-SFT: `weight * L_v`, smoothed over the image's other labels.

    Args:
        weight: lambda of (D4).
        smoothing: b of (D3) and (D5), in [0, 1).
        average: over the "labelled" visual tokens, over all "visual" tokens (the others count 0),
            or over each "image"'s own labelled tokens first and then over images.

    Source:
        (D1)-(D5) of docs/methods.md.
    """

    weight: float = 2e-3
    smoothing: float = 0.3
    average: Literal["labelled", "visual", "image"] = "labelled"

    def __post_init__(self) -> None:
        require(0.0 <= self.smoothing < 1.0, "smoothing", "a number in [0, 1)", self.smoothing)
        super().__post_init__()


@dataclass(frozen=True)
class Klal(_Checked):
    """KLAL: `weight * mean over rows and layers of KL(target || map)`.

    Args:
        weight: lambda of (K4).
        over: "columns" normalises each head over the row's image (K1); "renormalised" the head mean
            of the full rows, which weights a head by its visual mass; "visible" nothing: full-row
            probabilities, so that the loss also raises the visual mass.
        heads: "mean" is KL to the head mean (K2), "each" the mean over heads of each head's KL.
        layers: the decoder layers that count, by the decoder's own numbers; null: all that are
            softmax attention.
        divergence: "kl" (target || map), "reverse_kl" or "js" (`losses.map_divergence`).
        average_layers: one divergence of the map averaged over layers, instead of the mean of the
            layers' divergences.
        head_weight: "uniform", or "learned": `attach` adds one parameter [layers, heads], whose
            softmax (over heads; with average_layers over layers and heads) weights the heads.

    Source:
        (K1)-(K4) of docs/methods.md.
    """

    weight: float = 1.0
    over: Literal["columns", "renormalised", "visible"] = "columns"
    heads: Literal["mean", "each"] = "mean"
    layers: Layers = None
    divergence: Literal["kl", "reverse_kl", "js"] = "kl"
    average_layers: bool = False
    head_weight: Literal["uniform", "learned"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads == "each" and (self.from_maps or self.over == "renormalised"):
            fail("heads", "mean (each goes with divergence kl, layer by layer)", "each")
        if self.divergence == "reverse_kl" and self.over == "visible":
            fail("over", "columns or renormalised with reverse_kl, infinite elsewhere", "visible")

    @property
    def from_maps(self) -> bool:
        """Whether the loss is made of maps, and not in log space by `attention_kl`."""
        return self.average_layers or self.divergence != "kl" or self.over == "renormalised"


@dataclass(frozen=True)
class Hist(_Checked):
    """HIST in a decoder-only model: phrases of the answer.

    (H1) and (H2) are the next-token losses of phrase and subject tokens, (H3) compares the map of
    a composite phrase with those of its two parts.

    Args:
        phrase: weight of (H1), the phrases' tokens.
        subject: weight of (H2), the subjects' tokens.
        composition: weight of (H3), composites against their parts.
        maps: of (H3): "attention": the tokens' own rows, mean of heads and layers; "gradcam":
            `A * relu(dy/dA)` of the rows that predict the phrase, y its log probability, which
            needs attn_implementation eager.
        over: "columns" normalises attention over the visual tokens, "visible" over all visible
            keys.
        distance: "l2" (H3), "l1", "smooth_l1" or "kl" (`losses.composition`).
        detach_parts: only the composite's map learns in (H3).
        layers: the decoder layers whose maps are averaged, by the decoder's own numbers; null: all
            that are softmax attention.

    Source:
        (H1)-(H4) of docs/methods.md.
    """

    phrase: float = 1.0
    subject: float = 1.0
    composition: float = 1.0
    maps: Maps = "attention"
    over: Literal["columns", "visible"] = "columns"
    distance: Literal["l2", "l1", "smooth_l1", "kl"] = "l2"
    detach_parts: bool = False
    layers: Layers = None


@dataclass(frozen=True)
class Margins(_Checked):
    """AMC's margins on the map of KLAL's rows: inside the region above outside of it.

    Args:
        weight: factor on both hinges.
        mean_margin: between the means inside and outside (A1).
        max_margin: between the maxima inside and outside (A2).
        maps: "attention" of the row, or "gradcam" of the row's token, read at the row that predicts
            it, which needs attn_implementation eager.
        scale: a map is divided by its "max" or its "sum", so that margins mean the same at any
            resolution.
        inside: a visual token lies inside if its target is at least this share of the row's
            highest, in (0, 1].
        layers: the decoder layers whose maps are averaged, by the decoder's own numbers; null: all
            that are softmax attention.

    Source:
        (A1), (A2) of docs/methods.md.
    """

    weight: float = 1.0
    mean_margin: float = 0.1
    max_margin: float = 0.5
    maps: Maps = "attention"
    scale: Literal["max", "sum"] = "max"
    inside: float = 0.75
    layers: Layers = None

    def __post_init__(self) -> None:
        require(0.0 < self.inside <= 1.0, "inside", "a number in (0, 1]", self.inside)
        super().__post_init__()


@dataclass(frozen=True)
class LogitLens(_Checked):
    """Logit-lens loss: a concept's token at the visual tokens.

    Args:
        raise_weight: of (L1), the mean over visual tokens on the concept's object.
        suppress_weight: of (L2), the mean over the chosen visual tokens off it.

    Source:
        (L1), (L2) of docs/methods.md.
    """

    raise_weight: float = 1.0
    suppress_weight: float = 1.0


@dataclass(frozen=True)
class Basic(_Checked):
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
        (B1)-(B3) of docs/methods.md.
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
class PatchText(_Checked):
    """Patch-text contrast: a visual token on a region says that region's word rather than the other
    words of its image that have one.

    Args:
        weight: of (B4), the mean over visual tokens on regions.
        words: weight of (B5), where each word is found among the visual tokens of its image.
        temperature: tau of both, above 0.

    Source:
        (B4), (B5) of docs/methods.md.
    """

    weight: float = 1.0
    words: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", "a number above 0", self.temperature)


@dataclass(frozen=True)
class Objectives:
    """Everything `attach` was asked for.

    Args:
        smam: phrase-grounded auxiliary loss (regions); None, here and below: not trained.
        dv_sft: direct vision supervision (words).
        klal: attention-map loss (regions).
        hist: phrase, subject and composition losses (phrases).
        margins: margins of attention maps (regions).
        logit_lens: concepts at visual tokens (regions).
        basic: visual tokens against the decoder's first layers (images).
        patch_text: words of regions at visual tokens (regions).
        backend: of every op.
    """

    smam: Smam | None = None
    dv_sft: DvSft | None = None
    klal: Klal | None = None
    hist: Hist | None = None
    margins: Margins | None = None
    logit_lens: LogitLens | None = None
    basic: Basic | None = None
    patch_text: PatchText | None = None
    backend: str = "auto"

    @property
    def gradcam(self) -> tuple[str, ...]:
        """The objectives that differentiate twice."""
        made = {"hist": self.hist, "margins": self.margins}
        return tuple(name for name, how in made.items() if how and how.maps == "gradcam")

    @property
    def read_attention(self) -> bool:
        """Whether any of them needs more of the model than its last hidden states."""
        patches = self.basic is not None and self.basic.patches == "attention"
        read = (self.smam, self.klal, self.hist, self.margins)
        return patches or any(how is not None for how in read)
