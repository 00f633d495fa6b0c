"""What to train beside the text loss: one frozen dataclass per method, with the papers' weights."""

from __future__ import annotations

from dataclasses import dataclass

from groundkern.checks import fail, require

OVER = ("columns", "renormalised", "visible")
HEADS = ("mean", "each")
DIVERGENCES = ("kl", "reverse_kl", "js")
HEAD_WEIGHTS = ("uniform", "learned")
DIVIDE_BY = ("text", "aligned")
AVERAGES = ("labelled", "visual", "image")
MAPS = ("attention", "gradcam")
DISTANCES = ("l2", "l1", "smooth_l1", "kl")
SCALES = ("max", "sum")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        fail(name, " or ".join(known), value)


def _layers(layers: tuple[int, ...] | None) -> None:
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        fail("layers", "distinct layer numbers in ascending order, or None", layers)


def _weight(name: str, value: float) -> None:
    require(0.0 <= value < float("inf"), name, "a finite number >= 0", value)


@dataclass(frozen=True)
class Smam:
    """SMAM / PGA-SFT (METHODS.md section 1): `weight * (gamma * L_G + alpha * L_CE+)`.

    Args:
        weight: factor on both terms.
        beta, alpha, gamma: (S4), (S5); gamma 2.0 for LLaVA, 0.5 for Qwen.
        detach_reference: stop the gradient of (S4) towards pi+.
        divide_by: what the sum of (S5) is divided by: the "text" loss's own denominator, or the
            number of "aligned" rows.
    """

    weight: float = 1.0
    beta: float = 0.1
    alpha: float = 0.1
    gamma: float = 2.0
    detach_reference: bool = False
    divide_by: str = "text"

    def __post_init__(self) -> None:
        for name in ("weight", "beta", "alpha", "gamma"):
            _weight(name, getattr(self, name))
        _one_of("divide_by", self.divide_by, DIVIDE_BY)


@dataclass(frozen=True)
class DvSft:
    """DV-SFT (METHODS.md section 2): `weight * L_v`, smoothed over the image's other labels.

    Args:
        weight: lambda of (D4).
        smoothing: b of (D3).
        average: over the "labelled" visual tokens, over all "visual" tokens (the others count 0),
            or over each "image"'s own labelled tokens first and then over images.
    """

    weight: float = 2e-3
    smoothing: float = 0.3
    average: str = "labelled"

    def __post_init__(self) -> None:
        _weight("weight", self.weight)
        require(0.0 <= self.smoothing < 1.0, "smoothing", "a number in [0, 1)", self.smoothing)
        _one_of("average", self.average, AVERAGES)


@dataclass(frozen=True)
class Klal:
    """KLAL (METHODS.md section 3): `weight * mean over rows and layers of KL(target || map)`.

    Args:
        weight: lambda of (K4).
        over: "columns" normalises each head over the row's image (K1); "renormalised" the head mean
            of the full rows, which weights a head by its visual mass; "visible" nothing: full-row
            probabilities, which keeps the pressure on the visual mass.
        heads: "mean" is KL to the head mean (K2), "each" the mean over heads of each head's KL.
        layers: the decoder layers that count; None: all.
        divergence: "kl" (target || map), "reverse_kl" or "js" (`losses.map_divergence`).
        average_layers: one divergence of the map averaged over layers, in place of the mean over
            layers.
        head_weight: "uniform", or "learned": `attach` adds one parameter [layers, heads], whose
            softmax (over heads; with `average_layers` over layers and heads) weights the heads.
    """

    weight: float = 1.0
    over: str = "columns"
    heads: str = "mean"
    layers: tuple[int, ...] | None = None
    divergence: str = "kl"
    average_layers: bool = False
    head_weight: str = "uniform"

    def __post_init__(self) -> None:
        _weight("weight", self.weight)
        _one_of("over", self.over, OVER)
        _one_of("heads", self.heads, HEADS)
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("head_weight", self.head_weight, HEAD_WEIGHTS)
        _layers(self.layers)
        if self.heads == "each" and (self.from_maps or self.over == "renormalised"):
            fail("heads", "mean (each goes with divergence kl, layer by layer)", "each")
        if self.divergence == "reverse_kl" and self.over == "visible":
            fail("over", "columns or renormalised with reverse_kl, infinite elsewhere", "visible")

    @property
    def from_maps(self) -> bool:
        """Whether the loss is made of maps, and not in log space by `attention_kl`."""
        return self.average_layers or self.divergence != "kl" or self.over == "renormalised"


@dataclass(frozen=True)
class Hist:
    """HIST in a decoder-only model (METHODS.md section 4): phrases of the answer.

    (H1) and (H2) are the next-token losses of phrase and subject tokens, (H3) compares the map of
    a composite phrase with those of its two parts.

    Args:
        phrase, subject, composition: the weights of (H4).
        maps: "attention": the tokens' own rows, head and layer mean; "gradcam": `A * relu(dy/dA)`
            of the rows that predict the phrase, y its log probability. GradCAM needs
            attn_implementation="eager".
        over: of attention maps: "columns" or "visible", as in `Klal`.
        distance: "l2" (H3), "l1", "smooth_l1" or "kl" (`losses.composition`).
        detach_parts: let only the composite's map learn.
        layers: the decoder layers whose maps are averaged; None: all.
    """

    phrase: float = 1.0
    subject: float = 1.0
    composition: float = 1.0
    maps: str = "attention"
    over: str = "columns"
    distance: str = "l2"
    detach_parts: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("phrase", "subject", "composition"):
            _weight(name, getattr(self, name))
        _one_of("maps", self.maps, MAPS)
        _one_of("over", self.over, ("columns", "visible"))
        _one_of("distance", self.distance, DISTANCES)
        _layers(self.layers)


@dataclass(frozen=True)
class Margins:
    """AMC's margins on the map of KLAL's rows: inside the region above outside of it.

    Args:
        weight: factor on both hinges.
        mean_margin, max_margin: of (A1) and (A2).
        maps: "attention" of the row, or "gradcam" of the row's token, read at the row that predicts
            it (eager attention only).
        scale: what a map is divided by, so that margins mean the same at any resolution: its "max"
            or its "sum".
        inside: a visual token lies inside where its target is at least this share of the row's
            highest.
        layers: the decoder layers whose maps are averaged; None: all.
    """

    weight: float = 1.0
    mean_margin: float = 0.1
    max_margin: float = 0.5
    maps: str = "attention"
    scale: str = "max"
    inside: float = 0.75
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "mean_margin", "max_margin"):
            _weight(name, getattr(self, name))
        _one_of("maps", self.maps, MAPS)
        _one_of("scale", self.scale, SCALES)
        require(0.0 < self.inside <= 1.0, "inside", "a number in (0, 1]", self.inside)
        _layers(self.layers)


@dataclass(frozen=True)
class LogitLens:
    """Logit-lens loss (METHODS.md section 5): a concept's token at the visual tokens.

    Args:
        raise_weight: of (L1), the mean over visual tokens on the concept's object.
        suppress_weight: of (L2), the mean over the chosen visual tokens off it.
    """

    raise_weight: float = 1.0
    suppress_weight: float = 1.0

    def __post_init__(self) -> None:
        _weight("raise_weight", self.raise_weight)
        _weight("suppress_weight", self.suppress_weight)


@dataclass(frozen=True)
class Objectives:
    """Everything `attach` was asked for."""

    smam: Smam | None = None
    dv_sft: DvSft | None = None
    klal: Klal | None = None
    hist: Hist | None = None
    margins: Margins | None = None
    logit_lens: LogitLens | None = None
    backend: str = "auto"

    @property
    def gradcam(self) -> tuple[str, ...]:
        """The objectives that differentiate twice."""
        made = {"hist": self.hist, "margins": self.margins}
        return tuple(name for name, how in made.items() if how and how.maps == "gradcam")

    def layers(self) -> dict[str, tuple[int, ...]]:
        """The layer subsets that were asked for, by objective."""
        made = {"klal": self.klal, "hist": self.hist, "margins": self.margins}
        return {name: how.layers for name, how in made.items() if how and how.layers}
