"""The terms on visual tokens that need more than their scores: BASIC and patch-text contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundkern import linear_kl
from groundkern.hf.model.basic import basic_table
from groundkern.hf.model.body import BodyOutput
from groundkern.hf.model.head import forward_replaced, word_logits
from groundkern.hf.model.patch_weight import even_patches
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import take_rows
from groundkern.losses import mean_rows
from groundkern.token_losses import contrast, direction

Parts = dict[str, Tensor]


def basic_term(request: Request, body: BodyOutput) -> tuple[Tensor, Parts]:
    """(B2) and (B3) of all visual tokens, each counting for its a_i, divided by the images."""
    how, columns = request.terms.basic, request.batch.map_columns
    denominator, counted = request.denominator("image"), columns >= 0
    if how.patches == "attention":
        weight = body.readings.patches.mean()
    else:
        image = request.batch.image.gather(1, columns.clamp(min=0).long())
        weight = even_patches(torch.where(counted, image, -1))
    student, teacher = body.visual.student, body.visual.teacher  # [B, C, D]
    rows = weight * direction(student, teacher)
    parts = {"basic_direction": mean_rows(rows, counted, denominator=denominator)}
    loss = how.direction * parts["basic_direction"]
    if how.logits:
        table = basic_table(request.model, how)
        backend, detach = request.terms.backend, how.detach_head
        total = _weighted_kl(table, student, teacher, weight, counted, backend, detach)
        parts["basic_logits"] = mean_rows(total[None], denominator=denominator)
        loss = loss + how.logits * parts["basic_logits"]
    return loss, parts


def _weighted_kl(
    table: nn.Module,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    counted: Tensor,
    backend: str,
    detach: bool,
) -> Tensor:
    """Scalar: sum of a_i KL(softmax(E t_i) || softmax(E v_i)) (B3).

    The module that holds E is called once with its forward replaced, so that hooks that gather a
    sharded weight run as usual.
    """

    def divergence(x: Tensor) -> Tensor:
        own = table.weight
        e = own.detach() if detach else own
        rows = x.to(e.dtype), e, teacher.to(e.dtype), own.detach()
        return linear_kl(*rows, mask=counted, row_weight=weight, reduction="sum", backend=backend)

    with forward_replaced(table, divergence):
        return table(student)


def patch_text_term(request: Request, body: BodyOutput) -> tuple[Tensor, Parts]:
    """(B4) over the rows on regions, and (B5) over the words."""
    how, batch, split = request.terms.patch_text, request.batch, request.split
    at = batch.contrast_position if split is None else split.local(batch.contrast_position)
    words = batch.contrast_bag.flatten(1)  # [B, W]
    image = batch.image.gather(1, batch.contrast_position.clamp(min=0).long())  # [B, Rc]
    valid = _of_image(request, image) & (at >= 0)[..., None]  # [B, Rc, W]
    label = batch.contrast_label[:, :, None]  # [B, Rc, 1, M]
    match = ((words[:, None, :, None] == label) & (label >= 0)).any(-1) & valid
    rule, head = request.logit_rule, request.head
    position = torch.cat((at, batch.map_columns), 1) if how.words else at
    logits = word_logits(head, take_rows(body.hidden, position), words, rule)
    on, off = logits[:, : at.shape[1]], logits[:, at.shape[1] :]
    rows = batch.contrast_weight * contrast(on, match, valid, temperature=how.temperature)
    denominator = request.denominator("contrast")
    parts = {"patch_text": mean_rows(rows, at >= 0, denominator=denominator)}
    loss = how.weight * parts["patch_text"]
    if how.words:
        parts["text_patch"] = _found_words(request, off, match)
        loss = loss + how.words * parts["text_patch"]
    return loss, parts


def _found_words(request: Request, logits: Tensor, match: Tensor) -> Tensor:
    """(B5): the mean over words of each one's contrast among the visual tokens of its image.

    Args:
        request: of the batch.
        logits: [B, C, W] of all visual tokens.
        match: bool [B, Rc, W], the words of each token on a region.
    """
    batch = request.batch
    columns, position = batch.map_columns, batch.contrast_position
    image = batch.image.gather(1, columns.clamp(min=0).long())
    valid = _of_image(request, image) & (columns >= 0)[..., None]  # [B, C, W]
    length = batch.image.shape[1]
    place = torch.where(position >= 0, position, length).long()[..., None].expand(match.shape)
    said = match.new_zeros(len(match), length + 1, match.shape[2], dtype=torch.int32)
    said = said.scatter_reduce(1, place, match.int(), "amax")  # [B, S + 1, W]
    inside = take_rows(said, columns) > 0
    given = [x.transpose(1, 2) for x in (logits, inside, valid)]  # [B, W, C]
    rows = contrast(*given, temperature=request.terms.patch_text.temperature)
    words = batch.contrast_bag.flatten(1) >= 0
    return mean_rows(rows, words, denominator=request.denominator("contrast_word"))


def _of_image(request: Request, image: Tensor) -> Tensor:
    """bool [B, R, W]: the words of each row's image, among the words of all images of its sample.

    Args:
        request: of the batch.
        image: [B, R], -1 for none.
    """
    bag = request.batch.contrast_bag  # [B, I, Z]
    number = torch.arange(bag.shape[1], device=bag.device).repeat_interleave(bag.shape[2])
    return (bag.flatten(1) >= 0)[:, None] & (number == image[..., None])
