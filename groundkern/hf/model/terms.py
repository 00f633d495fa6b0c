"""The terms of the loss: every one a sum over the batch's rows divided by the step's count."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.hf.model.body import BodyOutput, explained_run
from groundkern.hf.model.gradcam import gradcam_maps, gradcam_terms, group_means, refuse_sharded
from groundkern.hf.model.head import RowScores
from groundkern.hf.model.head_weight import HEAD_WEIGHT
from groundkern.hf.model.readings import map_loss, map_rows_of, map_target
from groundkern.hf.model.request import Call
from groundkern.hf.supervision import word_images
from groundkern.losses import composition, logit_lens, margins, mean_rows, smam

Scores = dict[str, RowScores]
Parts = dict[str, Tensor]


def losses_of(call: Call, body: BodyOutput, scores: Scores) -> tuple[Tensor, Parts]:
    """The weighted sum of the attached terms, and every term divided by its denominator."""
    terms, attached = call.terms, call.attached
    parts = {"text": mean_rows(scores["text"].loss, denominator=call.denominator("text"))}  # (D1)
    loss = parts["text"]
    if terms.dv_sft is not None:
        parts["word"] = _word(call, scores)
        if attached.dv_sft is not None:
            loss = loss + attached.dv_sft.weight * parts["word"]  # (D4)
    if terms.smam is not None:
        total, parts["smam_grounding"], parts["smam_cross_entropy"] = _smam(call, scores)
        if attached.smam is not None:
            loss = loss + attached.smam.weight * total  # (S5)
    if terms.klal is not None:
        parts["map_kl"] = _map_kl(call, body)
        if attached.klal is not None:
            loss = loss + attached.klal.weight * parts["map_kl"]  # (K4)
    if terms.logit_lens is not None:
        parts["lens_raise"], parts["lens_suppress"] = _lens(call, scores["lens"])
        loss = loss + terms.logit_lens.raise_weight * parts["lens_raise"]  # (L1)
        loss = loss + terms.logit_lens.suppress_weight * parts["lens_suppress"]  # (L2)
    maps = _maps(call, body)
    if terms.hist is not None:
        parts |= _hist(call, scores["phrase"], maps.get("hist"))
        loss = loss + sum(getattr(terms.hist, name) * parts[name] for name in HIST if name in parts)
    if terms.margins is not None and _possible(call, "margins"):
        parts["margin_mean"], parts["margin_max"] = _margins(call, maps.get("margins"))
        loss = loss + terms.margins.weight * (parts["margin_mean"] + parts["margin_max"])
    learned = getattr(call.model, HEAD_WEIGHT, None)
    if learned is not None:  # a batch without maps must not leave it without a gradient (DDP)
        loss = loss + 0.0 * learned.sum()
    return loss, parts


HIST = ("phrase", "subject", "composition")  # the parts of (H4), and the weights in `Hist`


def _possible(call: Call, name: str) -> bool:
    """Whether an objective's maps can be made: GradCAM needs gradients.

    Where they can, its parts are there even without a row, so that all ranks log the same names.
    """
    return getattr(call.terms, name).maps == "attention" or name in gradcam_terms(call)


def _word(call: Call, scores: Scores) -> Tensor:
    """(D3) over labelled tokens, over all visual ones, or image by image."""
    rows, average = scores["word"].loss, call.terms.dv_sft.average
    if average == "labelled":
        return mean_rows(rows, denominator=call.denominator("word"))
    if average == "visual":
        return mean_rows(rows, denominator=call.denominator("visual"))
    image = word_images(call.s)  # [B, Rw], -1 where there is none
    images = call.s.word_bag.shape[0] * call.s.word_bag.shape[1]
    labelled = rows.new_zeros(images + 1).index_add(
        0, torch.where(image >= 0, image, images).flatten(), torch.ones_like(rows).flatten()
    )
    share = 1.0 / labelled[torch.where(image >= 0, image, images)].clamp(min=1)
    return mean_rows(rows * share, image >= 0, denominator=call.denominator("labelled_image"))


def _smam(call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Total, grounding and cross entropy of the aligned rows (S3)-(S5)."""
    how, side = call.terms.smam, scores["side"]
    rows = smam(
        -scores["reference"].loss,
        -side.loss,
        beta=how.beta,
        alpha=how.alpha,
        gamma=how.gamma,
        detach_reference=how.detach_reference,
    )
    counted, denominator = side.predicted >= 0, call.denominator(how.divide_by)
    return tuple(mean_rows(x, counted, denominator=denominator) for x in rows)


def _map_kl(call: Call, body: BodyOutput) -> Tensor:
    """(K3): the mean over rows of each row's mean over layers, or of its map's mean over layers."""
    denominator, readings = call.denominator("map"), body.readings
    if readings.kl is not None:
        return mean_rows(readings.kl.rows(), denominator=denominator)
    if readings.kl_map is not None:
        reading, klal = readings.kl_map, call.terms.klal
        rows = map_loss(reading.mean(), map_target(call), reading.seen > 0, klal)
        return mean_rows(rows, denominator=denominator)
    return denominator.new_zeros(())


def _lens(call: Call, scores: RowScores) -> tuple[Tensor, Tensor]:
    """(L1) and (L2) over the rows on and off their concept's object."""
    there, inside = call.s.lens_position >= 0, call.s.lens_inside > 0
    rows = logit_lens(-scores.loss, inside)
    return (
        mean_rows(rows, there & inside, denominator=call.denominator("raise")),
        mean_rows(rows, there & ~inside, denominator=call.denominator("suppress")),
    )


def _maps(call: Call, body: BodyOutput) -> Parts:
    """The differentiable maps: "hist" [B, P, C] by phrase, "margins" [B, Rm, C] by row."""
    s, readings, wanted = call.s, body.readings, gradcam_terms(call)
    maps, phrases = {}, s.phrase_position.shape[1]  # no sample has more phrases than rows
    if wanted:
        refuse_sharded(call.model)
        hidden, explained = explained_run(call, body)
    if readings.phrase_map is not None:
        rows = readings.phrase_map.mean().unflatten(0, s.phrase_position.shape)
        maps["hist"] = group_means(rows, s.phrase_number, phrases)
    elif "hist" in wanted:
        some = phrases and s.phrase_composite.shape[1]
        groups = int(s.phrase_number.max()) + 1 if some else 0
        at = s.phrase_position, s.phrase_number, groups
        rows = gradcam_maps(call, hidden, explained, *at, call.terms.hist.layers)
        maps["hist"] = group_means(rows, s.phrase_number, phrases)
    if readings.margin_map is not None:
        maps["margins"] = readings.margin_map.mean().unflatten(0, s.map_position.shape)
    elif "margins" in wanted:
        number = torch.arange(s.map_position.shape[1], device=s.map_position.device)
        before = torch.where(s.map_position > 0, s.map_position - 1, -1)  # predicts the row's token
        group = torch.where(before >= 0, number, -1)
        layers = call.terms.margins.layers
        maps["margins"] = gradcam_maps(call, hidden, explained, before, group, len(number), layers)
    return maps


def _hist(call: Call, scores: RowScores, maps: Tensor | None) -> Parts:
    """(H1), (H2) as next-token losses and (H3) on the phrases' maps [B, P, C]."""
    s, how = call.s, call.terms.hist
    subject = s.phrase_subject[:, : scores.loss.shape[1]] > 0
    parts = {
        "phrase": mean_rows(scores.loss, denominator=call.denominator("phrase")),
        "subject": mean_rows(scores.loss, subject, denominator=call.denominator("subject")),
    }
    if _possible(call, "hist"):
        parts["composition"] = call.denominators.new_zeros(())
    if maps is not None:
        three = s.phrase_composite  # [B, K, 3]
        batch = torch.arange(len(three), device=three.device)[:, None]
        whole, first, second = (maps[batch, i] for i in three.clamp(min=0).long().unbind(-1))
        rows = composition(
            whole, first, second, distance=how.distance, detach_parts=how.detach_parts
        )
        counted = (three >= 0).all(-1)
        parts["composition"] = mean_rows(rows, counted, denominator=call.denominator("composite"))
    return parts


def _margins(call: Call, maps: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A1) and (A2) of the map rows, on maps [B, Rm, C] in units of their maximum or sum."""
    if maps is None:  # no row or no visual token in this batch
        return (call.denominators.new_zeros(()),) * 2
    how, target = call.terms.margins, map_target(call).view(maps.shape)
    own = map_rows_of(call).own(None).view(maps.shape)
    maps = maps.masked_fill(~own, 0.0)
    if maps.shape[-1]:
        unit = maps.amax(-1, keepdim=True) if how.scale == "max" else maps.sum(-1, keepdim=True)
        maps = maps / torch.where(unit > 0, unit, 1.0)
        inside = (target >= how.inside * target.amax(-1, keepdim=True)) & (target > 0)
    else:
        inside = own
    rows = margins(maps, inside, valid=own, mean_margin=how.mean_margin, max_margin=how.max_margin)
    return tuple(mean_rows(x, denominator=call.denominator("map")) for x in rows)
