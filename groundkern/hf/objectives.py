"""What to train beside the text loss: one frozen dataclass per method, with the papers' weights.

`groundkern.trainer.config` validates these same classes with pydantic; its `--help` shows the Args
of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundkern.hf.checked import (
    LARGEST,
    MOST_LAYERS,
    Checked,
    Chosen,
    Control,
    Heads,
    Layers,
    Maps,
)
from groundkern.hf.token_objectives import Basic as Basic
from groundkern.hf.token_objectives import PatchText as PatchText
from groundkern.messages import fail, require


@dataclass(frozen=True)
class Smam(Checked):
    """SMAM / PGA-SFT: `weight * (gamma * L_G + alpha * L_CE+)`.

    Args:
        weight: factor on both terms.
        beta: slope of the grounding loss (S4).
        alpha: weight of the masked cross entropy (S5).
        gamma: weight of the grounding loss (S5); the paper: 2.0 for LLaVA, 0.5 for Qwen.
        detach_reference: no gradient through the masked pass pi+ in (S4).
        divide_by: the sum of (S5) is divided by the "text" loss's own denominator, or by the number
            of "aligned" rows.
        control: train on wrong regions on purpose, which must not help: those of another sample
            ("shuffled"), the own ones somewhere else ("random"), or what the region does not cover
            ("complement"). The collator makes them: its `side_control`.
        keep: visual tokens that every set of (S1) has besides: "registers", which have no place of
            their own (the collator's `keep_registers`), or "sinks", on which text attends whatever
            it says (S6).
        keep_sinks: how many sinks an image has.
        sink_layer: the layer that shows which they are, or the first one of softmax attention
            behind it; layers before it have none.

    Source:
        (S1)-(S6) of docs/methods/index.md.
    """

    weight: float = 1.0
    beta: float = 0.1
    alpha: float = 0.1
    gamma: float = 2.0
    detach_reference: bool = False
    divide_by: Literal["text", "aligned"] = "text"
    control: Control = None
    keep: Literal[None, "registers", "sinks"] = None
    keep_sinks: int = 4
    sink_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        count = 0 < self.keep_sinks <= MOST_LAYERS
        require(count, "keep_sinks", f"a number in [1, {MOST_LAYERS}]", self.keep_sinks)
        known = 0 <= self.sink_layer < MOST_LAYERS
        require(known, "sink_layer", f"a layer in [0, {MOST_LAYERS})", self.sink_layer)


@dataclass(frozen=True)
class DvSft(Checked):
    """DV-SFT: `weight * L_v`, smoothed over the image's other labels.

    Args:
        weight: lambda of (D4).
        smoothing: b of (D3) and (D5), in [0, 1).
        average: over the "labelled" visual tokens, over all "visual" tokens (the others count 0),
            or over each "image"'s own labelled tokens first and then over images.

    Source:
        (D1)-(D5) of docs/methods/index.md.
    """

    weight: float = 2e-3
    smoothing: float = 0.3
    average: Literal["labelled", "visual", "image"] = "labelled"

    def __post_init__(self) -> None:
        require(0.0 <= self.smoothing < 1.0, "smoothing", "a number in [0, 1)", self.smoothing)
        super().__post_init__()


@dataclass(frozen=True)
class Klal(Checked):
    """KLAL: `weight * mean over rows and layers of KL(target || map)`.

    Args:
        weight: lambda of (K4).
        over: "columns" normalises each head over the row's image (K1); "renormalised" the head mean
            of the full rows, which weights a head by its visual mass; "visible" nothing: full-row
            probabilities, so that the loss also raises the visual mass.
        heads: "mean" is KL to the head mean (K2), "each" the mean over heads of each head's KL.
        layers: the decoder layers that count, by the decoder's own numbers; null: all that are
            softmax attention.
        divergence: "kl" (target || map), "reverse_kl" or "js" (K5); or of the
            map's mass on the target alone, "mass": -log of it, as in GuidedVLA with over "visible",
            or "share": (1 - it)^2, as in A3Tune with over "renormalised".
        average_layers: one divergence of the map averaged over layers, instead of the mean of the
            layers' divergences.
        head_weight: "uniform", or "learned": `attach` adds one parameter [layers, heads], whose
            softmax (over heads; with average_layers over layers and heads) weights the heads; or
            GUI-AIMA's, found anew for each row with average_layers and over "renormalised":
            "sink", by the mass that the query tokens most like the image have on it, or "pattern",
            by how close all query tokens' masses are to their likeness (both need
            `gk_query_position`, the collator's `query_tokens`).
        sink_queries: with head_weight "sink", how many query tokens are taken (K of (G1)).
        control: targets of wrong regions on purpose, as of `Smam`; "complement" is what the target
            lacks to its maximum. The collator makes them: its `map_control`.
        chosen_heads: (layer, head) pairs, the only heads that count and that are computed; the
            layers are those of the pairs. null: all heads of `layers`.
        picked_heads: of each row, in every step anew and without a gradient through the choice, so
            many heads of all layers: those with most of their attention on its image; with
            average_layers. null: not picked.

    Source:
        (K1)-(K6), (G1), (G2), (G4) of docs/methods/index.md.
    """

    weight: float = 1.0
    over: Literal["columns", "renormalised", "visible"] = "columns"
    heads: Literal["mean", "each"] = "mean"
    layers: Layers = None
    divergence: Literal["kl", "reverse_kl", "js", "mass", "share"] = "kl"
    average_layers: bool = False
    head_weight: Literal["uniform", "learned", "sink", "pattern"] = "uniform"
    sink_queries: int = 1
    control: Control = None
    chosen_heads: Heads = None
    picked_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.sink_queries <= 1000, "sink_queries", "in [1, 1000]", self.sink_queries)
        if self.by_queries and self.over != "renormalised":
            fail("over", f"renormalised with head_weight {self.head_weight}", self.over)
        if self.by_queries and self.chosen_heads is not None:
            wanted = (
                f"None with head_weight {self.head_weight}, which weights all heads of `layers`"
            )
            fail("chosen_heads", wanted, self.chosen_heads)
        if self.by_queries and not self.average_layers:
            wanted = f"true with head_weight {self.head_weight}, whose weights are of all layers"
            fail("average_layers", wanted, "false")
        if self.heads == "each" and (self.from_maps or self.over == "renormalised"):
            fail("heads", "mean (each goes with divergence kl, layer by layer)", "each")
        if self.divergence == "reverse_kl" and self.over == "visible":
            fail("over", "columns or renormalised with reverse_kl, infinite elsewhere", "visible")
        if self.chosen_heads is not None and self.layers is not None:
            fail("layers", "None beside chosen_heads, whose pairs name the layers", self.layers)
        if self.picked_heads is not None:
            self._check_picked(self.picked_heads)

    def _check_picked(self, count: int) -> None:
        """What `picked_heads` goes with."""
        known = type(count) is int and 0 < count <= LARGEST
        require(known, "picked_heads", "a number above 0, or None", count)
        wanted = "True with picked_heads, which come from all layers"
        require(self.average_layers, "average_layers", wanted, self.average_layers)
        if self.chosen_heads is not None:
            fail("chosen_heads", "None beside picked_heads", self.chosen_heads)
        if self.head_weight != "uniform":
            fail("head_weight", "uniform with picked_heads", self.head_weight)

    @property
    def heads_by_layer(self) -> dict[int, tuple[int, ...]] | None:
        """The chosen heads of each layer, both in ascending order; None: all heads count."""
        if self.chosen_heads is None:
            return None
        pairs = sorted(map(tuple, self.chosen_heads))
        return {layer: tuple(h for of, h in pairs if of == layer) for layer, _ in pairs}

    @property
    def counted_layers(self) -> Layers:
        """The layers that count; None: all that are softmax attention."""
        chosen = self.heads_by_layer
        return self.layers if chosen is None else tuple(chosen)

    @property
    def by_queries(self) -> bool:
        """Whether heads weigh by what the tokens before a row attend to (G1)."""
        return self.head_weight in ("sink", "pattern")

    @property
    def of_mass(self) -> bool:
        """Whether the loss is on the map's mass on the target (G4)."""
        return self.divergence in ("mass", "share")

    @property
    def from_maps(self) -> bool:
        """Whether the loss is made of maps, and not in log space by `attention_kl`."""
        return self.average_layers or self.divergence != "kl" or self.over == "renormalised"


@dataclass(frozen=True)
class Hist(Checked):
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
        (H1)-(H4) of docs/methods/index.md.
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
class Margins(Checked):
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
        (A1), (A2) of docs/methods/index.md.
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
class LogitLens(Checked):
    """Logit-lens loss: a concept's token at the visual tokens.

    Args:
        raise_weight: of (L1), the mean over visual tokens on the concept's object.
        suppress_weight: of (L2), the mean over the chosen visual tokens off it.

    Source:
        (L1), (L2) of docs/methods/index.md.
    """

    raise_weight: float = 1.0
    suppress_weight: float = 1.0


@dataclass(frozen=True)
class AttentionPolicy(Checked):
    """Reinforced attention learning: rows stay near the attention they had when they were sampled,
    or move away from it, as the advantage says.

    `weight * mean over rows of advantage * D(reference, attention)`; the batch has rows, advantages
    and references as `gk_policy_*` tensors, which no data file holds.

    Args:
        weight: lambda of (R2).
        divergence: D, as in `losses.map_divergence` with the reference as its target.
        layers: whose attention is compared, as the decoder numbers them; "last": the last layer of
            softmax attention, "all": every one. Divergences are averaged over layers.
        exclude_self: leave out a token's own position (R1).
        rows: what `policy_rows` makes rows of: the "own" rows of the trained tokens, or the
            "predictor" rows before them. The latter stand before the token and leave out nothing.

    Source:
        (R1), (R2) of docs/methods/index.md.
    """

    weight: float = 1.0
    divergence: Literal["js", "kl", "reverse_kl"] = "js"
    layers: Chosen = "last"
    exclude_self: bool = True
    rows: Literal["own", "predictor"] = "own"

    @property
    def leaves_out_self(self) -> bool:
        """Whether a row's own position takes no part."""
        return self.exclude_self and self.rows == "own"


@dataclass(frozen=True)
class Distillation(Checked):
    """Attention, and tokens, of a teacher that runs in the same step: `attach(..., teacher=)`.

    `attention * mean over trained tokens of D(teacher's attention, own)` plus
    `tokens * mean over trained tokens of the divergence between both distributions`.

    Args:
        attention: gamma of (R3); 0: no attention is compared.
        tokens: mu of (R3), of the next-token distributions by `linear_kl`; 0: none are compared.
        divergence: of attention, as in `losses.map_divergence` with the teacher as its target.
        layers: as in `AttentionPolicy`.
        teacher_layers: of the teacher, one for each of `layers`; null: at the same share of its
            depth, so that the last meets the last.
        exclude_self: leave out a token's own position (R1).
        rows: of attention: the "own" rows of the trained tokens, or the "predictor" rows before.
        token_divergence: of tokens, as in `linear_kl`: "forward" is KL(teacher || student).
        beta: of token_divergence js, in (0, 1).
        temperature: both distributions' logits are divided by it.
        shared_ids: compare the first so many token ids alone, where tables are padded to different
            sizes; null: all, and both must have as many.

    Source:
        (R3) of docs/methods/index.md.
    """

    attention: float = 1.0
    tokens: float = 0.0
    divergence: Literal["js", "kl", "reverse_kl"] = "js"
    layers: Chosen = "last"
    teacher_layers: Layers = None
    exclude_self: bool = True
    rows: Literal["own", "predictor"] = "own"
    token_divergence: Literal["forward", "reverse", "js"] = "js"
    beta: float = 0.5
    temperature: float = 1.0
    shared_ids: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 < self.beta < 1.0, "beta", "a number in (0, 1)", self.beta)
        require(self.temperature > 0.0, "temperature", "a number above 0", self.temperature)
        require(self.attention + self.tokens > 0, "attention", "a weight, here or of tokens", 0)
        ids = self.shared_ids
        known = ids is None or 0 < ids <= LARGEST
        require(known, "shared_ids", f"a number of token ids in [1, {LARGEST:g}] or None", ids)

    @property
    def leaves_out_self(self) -> bool:
        """Whether a row's own position takes no part."""
        return self.exclude_self and self.rows == "own"


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
        policy: attention near that of the policy that sampled the answer, or away from it.
        distill: attention and tokens of a teacher.
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
    policy: AttentionPolicy | None = None
    distill: Distillation | None = None
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
        if patches or self.policy is not None:
            return True
        if self.distill is not None and self.distill.attention:
            return True
        return any(how is not None for how in (self.smam, self.klal, self.hist, self.margins))
