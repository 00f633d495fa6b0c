"""The terms of the loss: each is a weighted sum over the batch's rows divided by the step's count
of rows (W1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.hf.data.batch import COUNTS
from groundkern.hf.data.weights import composite_weights
from groundkern.hf.model.body import BodyOutput
from groundkern.hf.model.gradcam import gradcam_maps, group_means
from groundkern.hf.model.head import RowScores
from groundkern.hf.model.head_weight import HEAD_WEIGHT
from groundkern.hf.model.lesson import taught_tokens
from groundkern.hf.model.map_readings import map_loss
from groundkern.hf.model.readings import map_rows_of, map_target
from groundkern.hf.model.request import Request
from groundkern.hf.model.router import ROUTER
from groundkern.hf.model.rows import word_images
from groundkern.hf.model.visual_terms import basic_term, patch_text_term
from groundkern.hf.objectives import Objectives
from groundkern.losses import composition, logit_lens, margins, mean_rows, smam

WORD_COUNTS = {"labelled": "word", "visual": "visual", "image": "labelled_image"}
HIST_COUNTS = {"phrase": "phrase", "subject": "subject", "composition": "composite"}

Scores = dict[str, RowScores]
Parts = dict[str, Tensor]


def losses_of(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """The weighted sum of the attached terms, and the parts of all that are computed.

    Args:
        request: what to compute.
        body: the run.
        scores: of the rows that each term scores, by name.

    Returns:
        fp32 scalar, and scalars by name: each without its weight, divided by its denominator. If
        the request names one part, the scalar is that part alone with its weight.
    """
    if request.temperature is None:
        text = mean_rows(scores["text"].loss, denominator=request.denominator("text"))  # (D1)
        loss, parts = text, {"text": text}
    else:
        loss, parts = request.denominators.new_zeros(()), {}
    for name, term in TERMS.items():
        if getattr(request.terms, name) is not None:
            weighted, found = term(request, body, scores)
            parts |= found
            if getattr(request.attached, name) is not None:
                loss = loss + weighted
    if body.router is not None:
        parts[ROUTER] = _router(request, body.router)
        loss = loss + parts[ROUTER]
    learned = getattr(request.model, HEAD_WEIGHT, None)
    if learned is not None:  # a batch without maps must not leave it without a gradient (DDP)
        loss = loss + 0.0 * learned.sum()
    if request.part is not None:
        part = parts.get(request.part, loss.detach() * 0.0)
        loss = part_rules(request.attached, routers=True)[request.part].weight * part
    return loss, parts


class PartRule(NamedTuple):
    """How a part enters the loss: its factor, which of COUNTS its sum is divided by, and which
    counts the rows without which it says nothing."""

    weight: float
    count: str
    rows: str


def part_rules(objectives: Objectives, *, routers: bool = False) -> dict[str, PartRule]:
    """How the parts of the loss add up: it is the sum of `weight * part`.

    Args:
        objectives: what is computed.
        routers: add the rule of the routers' loss, which only some models have.

    Returns:
        The rule of every part, by its name in `GroundedOutput.parts`.
    """
    names = ("text", ROUTER) if routers else ("text",)
    rules = {name: PartRule(1.0, "text", "text") for name in names}
    if (dv_sft := objectives.dv_sft) is not None:
        rules["word"] = PartRule(dv_sft.weight, WORD_COUNTS[dv_sft.average], "word")
    if (smam := objectives.smam) is not None:
        weights = {"smam_grounding": smam.gamma, "smam_cross_entropy": smam.alpha}
        for name, weight in weights.items():
            rules[name] = PartRule(smam.weight * weight, smam.divide_by, "aligned")
    if (klal := objectives.klal) is not None:
        rules["map_kl"] = PartRule(klal.weight, "map", "map")
    if (lens := objectives.logit_lens) is not None:
        rules["lens_raise"] = PartRule(lens.raise_weight, "raise", "raise")
        rules["lens_suppress"] = PartRule(lens.suppress_weight, "suppress", "suppress")
    if (basic := objectives.basic) is not None:
        rules["basic_direction"] = PartRule(basic.direction, "image", "image")
        if basic.logits:
            rules["basic_logits"] = PartRule(basic.logits, "image", "image")
    if (text := objectives.patch_text) is not None:
        rules["patch_text"] = PartRule(text.weight, "contrast", "contrast")
        if text.words:
            rules["text_patch"] = PartRule(text.words, "contrast_word", "contrast_word")
    if (hist := objectives.hist) is not None:
        for name, count in HIST_COUNTS.items():
            rules[name] = PartRule(getattr(hist, name), count, count)
    if (margin := objectives.margins) is not None:
        for name in ("margin_mean", "margin_max"):
            rules[name] = PartRule(margin.weight, "map", "map")
    if (policy := objectives.policy) is not None:
        rules["policy"] = PartRule(policy.weight, "policy", "policy")
        rules["policy_divergence"] = PartRule(0.0, "policy", "policy")  # for the log
    if (distill := objectives.distill) is not None:
        for name in ("attention", "tokens"):
            if weight := getattr(distill, name):
                rules[f"distill_{name}"] = PartRule(weight, "text", "text")
    return rules


def _router(request: Request, loss: Tensor) -> Tensor:
    """The routers' loss times this batch's share of the step's trained tokens, so that
    micro-batches and ranks add up to a mean; a batch alone has all of it."""
    total, own = request.denominator("text"), request.batch.counts[COUNTS.index("text")]
    return loss.float() * torch.where(total > 0, own / total.clamp(min=1), 1.0)


def _dv_sft(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(D3), of several labels (D5), over labelled tokens, over all visual ones, or image by image;
    weighted by (D4)."""
    rows, dv_sft = scores["word"].loss, request.terms.dv_sft
    weight = request.batch.word_weight
    if dv_sft.average == "image":
        bags = len(request.batch.word_bag.flatten(0, 1))
        image = word_images(request.batch)  # [B, Rw], -1 where there is none
        place = torch.where(image >= 0, image, bags)
        labelled = rows.new_zeros(bags + 1)
        labelled.index_add_(0, place.flatten(), torch.ones_like(rows).flatten())
        rows, counted = rows * (1.0 / labelled[place].clamp(min=1)), image >= 0
    else:
        counted = None
    denominator = request.denominator(WORD_COUNTS[dv_sft.average])
    word = mean_rows(rows, counted, weight=weight, denominator=denominator)
    return dv_sft.weight * word, {"word": word}


def _smam(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """Grounding and cross entropy of the aligned rows (S3)-(S5)."""
    how, side = request.terms.smam, scores["side"]
    rows = smam(
        -scores["reference"].loss,
        -side.loss,
        beta=how.beta,
        alpha=how.alpha,
        gamma=how.gamma,
        detach_reference=how.detach_reference,
    )
    counted, denominator = side.predicted >= 0, request.denominator(how.divide_by)
    weight = request.batch.side_weight
    total, grounding, cross_entropy = (
        mean_rows(x, counted, weight=weight, denominator=denominator) for x in rows
    )
    parts = {"smam_grounding": grounding, "smam_cross_entropy": cross_entropy}
    return how.weight * total, parts


def _klal(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(K3): the mean over rows of each row's mean over layers, or of its map's mean over layers."""
    denominator, readings, klal = request.denominator("map"), body.readings, request.terms.klal
    weight = request.batch.map_weight.flatten()  # [N]
    kl = denominator.new_zeros(())
    if readings.kl is not None:
        kl = mean_rows(readings.kl.rows(), weight=weight, denominator=denominator)
    if readings.kl_map is not None:
        own = readings.kl_map.seen > 0
        rows = map_loss(readings.kl_map.mean(), map_target(request), own, klal) * request.share
        kl = mean_rows(rows, weight=weight, denominator=denominator)
    return klal.weight * kl, {"map_kl": kl}  # (K4)


def _logit_lens(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(L1) and (L2) over the rows on and off their concept's object."""
    how, counted = request.terms.logit_lens, scores["lens"].predicted >= 0
    inside, weight = request.batch.lens_inside > 0, request.batch.lens_weight
    rows = logit_lens(-scores["lens"].loss, inside)
    divided_by = (request.denominator(name) for name in ("raise", "suppress"))
    on, off = (
        mean_rows(rows, counted & side, weight=weight, denominator=denominator)
        for side, denominator in zip((inside, ~inside), divided_by)
    )
    loss = how.raise_weight * on + how.suppress_weight * off
    return loss, {"lens_raise": on, "lens_suppress": off}


def _basic(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    return basic_term(request, body)


def _patch_text(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    return patch_text_term(request, body)


def _hist(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(H1), (H2) as next-token losses, (H3) on the phrases' maps; weighted by (H4).

    With GradCAM maps and gradients off there is no composition; otherwise it is there even without
    a row, so that all ranks log the same names.
    """
    batch, how, rows = request.batch, request.terms.hist, scores["phrase"].loss
    subject, weight = batch.phrase_subject > 0, batch.phrase_weight
    parts = {
        name: mean_rows(rows, counted, weight=weight, denominator=request.denominator(name))
        for name, counted in (("phrase", None), ("subject", subject))
    }
    maps = _phrase_maps(request, body)
    if maps is not None:
        three = batch.phrase_composite  # [B, K, 3]
        number = torch.arange(len(three), device=three.device)[:, None]
        whole, first, second = (maps[number, i] for i in three.clamp(min=0).long().unbind(-1))
        rows = composition(
            whole, first, second, distance=how.distance, detach_parts=how.detach_parts
        )
        counted = (three >= 0).all(-1)
        weight = composite_weights(three, batch.phrase_position, batch.phrase_number, weight)
        denominator = request.denominator("composite")
        mean = mean_rows(rows, counted, weight=weight, denominator=denominator)
        parts["composition"] = request.share * mean
    elif how.maps == "attention":
        parts["composition"] = request.denominators.new_zeros(())
    return sum(getattr(how, name) * part for name, part in parts.items()), parts


def _phrase_maps(request: Request, body: BodyOutput) -> Tensor | None:
    """[B, P, C]: the differentiable map of every phrase; no sample has more phrases than rows."""
    batch, reading = request.batch, body.readings.phrase_map
    position, number = batch.phrase_position, batch.phrase_number
    if request.terms.hist.maps == "gradcam" and body.gradcam is not None:
        composed = position.shape[1] > 0 and batch.phrase_composite.shape[1] > 0
        groups = int(number.max()) + 1 if composed else 0
        layers = request.terms.hist.layers
        rows = gradcam_maps(request, body.gradcam, position, number, groups=groups, layers=layers)
    elif reading is not None:
        rows = reading.mean().unflatten(0, position.shape)
    else:
        return None
    return group_means(rows, number, position.shape[1])


def _margins(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(A1) and (A2) of the map rows; absent with GradCAM maps and gradients off, as in `_hist`."""
    how, maps = request.terms.margins, _margin_maps(request, body)
    zero = request.denominators.new_zeros(())
    if maps is None and how.maps == "gradcam":
        return zero, {}
    if maps is None:  # no row or no visual token in this batch
        return zero, {"margin_mean": zero, "margin_max": zero}
    target = map_target(request).view(maps.shape)
    reading = body.readings.margin_map
    at = map_rows_of(request) if reading is None else reading.at
    own = at.own(None).view(maps.shape)
    maps = maps.masked_fill(~own, 0.0)
    inside = own
    if maps.shape[-1]:
        unit = maps.amax(-1, keepdim=True) if how.scale == "max" else maps.sum(-1, keepdim=True)
        maps = maps / torch.where(unit > 0, unit, 1.0)
        inside = (target >= how.inside * target.amax(-1, keepdim=True)) & (target > 0)
    rows = margins(maps, inside, valid=own, mean_margin=how.mean_margin, max_margin=how.max_margin)
    weighted = {"weight": request.batch.map_weight, "denominator": request.denominator("map")}
    mean, most = (request.share * mean_rows(x, **weighted) for x in rows)
    return how.weight * (mean + most), {"margin_mean": mean, "margin_max": most}


def _margin_maps(request: Request, body: BodyOutput) -> Tensor | None:
    """[B, Rm, C]: the differentiable map of every map row."""
    token, reading = request.batch.map_token_position, body.readings.margin_map
    if request.terms.margins.maps == "gradcam" and body.gradcam is not None:
        number = torch.arange(token.shape[1], device=token.device)
        before = torch.where(token > 0, token - 1, -1)  # predicts it
        group = torch.where(before >= 0, number, -1)
        groups, layers = len(number), request.terms.margins.layers
        return gradcam_maps(request, body.gradcam, before, group, groups=groups, layers=layers)
    return None if reading is None else reading.mean().unflatten(0, token.shape)


def _policy(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(R2): every row counts, whatever its advantage is."""
    reading, batch = body.readings.policy, request.batch
    zero = request.denominators.new_zeros(())
    if reading is None:
        return zero, {"policy": zero, "policy_divergence": zero}
    rows = reading.mean().view(batch.policy_position.shape)
    counted, denominator = batch.policy_position >= 0, request.denominator("policy")
    part = mean_rows(batch.policy_weight * rows, counted, denominator=denominator)
    plain = mean_rows(rows.detach(), counted, denominator=denominator)
    return request.terms.policy.weight * part, {"policy": part, "policy_divergence": plain}


def _distill(request: Request, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """(R3) over the trained tokens."""
    how, position = request.terms.distill, request.batch.text_position
    counted, denominator, rows = position >= 0, request.denominator("text"), {}
    if how.attention:
        reading = body.readings.distilled
        found = torch.zeros_like(position, dtype=torch.float32) if reading is None else None
        rows["attention"] = reading.mean().view(position.shape) if found is None else found
    if how.tokens:
        rows["tokens"] = taught_tokens(request, body.hidden, body.lesson)
    means = {name: mean_rows(x, counted, denominator=denominator) for name, x in rows.items()}
    loss = sum(getattr(how, name) * mean for name, mean in means.items())
    return loss, {f"distill_{name}": mean for name, mean in means.items()}


# By the names of `Objectives`, in the order in which the loss is summed.
TERMS = {
    "dv_sft": _dv_sft,
    "smam": _smam,
    "klal": _klal,
    "logit_lens": _logit_lens,
    "basic": _basic,
    "patch_text": _patch_text,
    "hist": _hist,
    "margins": _margins,
    "policy": _policy,
    "distill": _distill,
}
