"""One step of a teacher: it runs on the student's batch, and its tokens are compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundkern import linear_kl
from groundkern.hf.model.body import read_body
from groundkern.hf.model.head import forward_replaced, is_plain, offset_bias
from groundkern.hf.model.policy import TeacherAttention
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import take_rows
from groundkern.hf.model.teacher import Lesson, Teacher, taught_rows
from groundkern.hf.objectives import Objectives


def teach(request: Request, teacher: Teacher | None) -> Lesson | None:
    """Run a teacher on a batch, without gradients.

    Args:
        request: of the student.
        teacher: that `attach` was given.

    Returns:
        What the student is compared with; None if nothing is distilled.

    Raises:
        ValueError: a teacher in training mode, or that does not take the batch.
    """
    how = request.terms.distill
    if how is None:
        return None
    teacher.ready(request.input_ids.device)
    position = request.batch.text_position
    own = {"gk_image": request.batch.image, "gk_text_position": position}
    with torch.no_grad():
        objectives = Objectives(backend=request.terms.backend)
        theirs = Request.of(teacher.model, objectives, {**request.given, **own})
        attention = None
        if how.attention and position.shape[1]:
            layers = tuple(sorted({number for _, number in teacher.pairs}))
            attention = TeacherAttention(taught_rows(theirs, how), layers)
        hidden = read_body(theirs, [] if attention is None else [attention])
        hidden = take_rows(hidden, position)
    return Lesson(teacher.model, hidden, attention, teacher.pairs)


def taught_tokens(request: Request, hidden: Tensor, lesson: Lesson) -> Tensor:
    """The divergence between both models' distributions of each trained token.

    Args:
        request: of the student.
        hidden: [B, S, D], its last hidden states, times the logits' scale.
        lesson: of the same batch.

    Returns:
        [B, Rt] fp32; 0 for padding.

    Source: (R3), by (T1)-(T4).
    """
    how, position = request.terms.distill, request.batch.text_position
    head, other = request.head, lesson.model.get_output_embeddings()
    rule, other_rule = request.logit_rule, lesson.logit_rule
    counted, size = (position >= 0).flatten(), how.shared_ids
    own, theirs = take_rows(hidden, position).flatten(0, 1), lesson.hidden.flatten(0, 1)
    settings = {"kind": how.token_divergence, "beta": how.beta, "temperature": how.temperature}
    if not (is_plain(head) and is_plain(other)):
        with torch.no_grad():
            wanted = other_rule.of(other(theirs).float())[:, :size]
        found = rule.of(head(own).float())[:, :size]
        rows = token_divergence(found, wanted, **settings).masked_fill(~counted, 0.0)
        return rows.view(position.shape)

    def fused(x: Tensor) -> Tensor:
        bias, other_bias = offset_bias(head, rule), offset_bias(other, other_rule)
        return linear_kl(
            x,
            head.weight[:size],
            theirs,
            other.weight[:size],
            bias=None if bias is None else bias[:size],
            teacher_bias=None if other_bias is None else other_bias[:size],
            softcap=rule.softcap,
            teacher_softcap=other_rule.softcap,
            mask=counted,
            reduction="none",
            backend=request.terms.backend,
            **settings,
        )

    with forward_replaced(head, fused):
        return head(own).view(position.shape)


def token_divergence(
    logits: Tensor, teacher_logits: Tensor, *, kind: str, beta: float, temperature: float
) -> Tensor:
    """What `linear_kl` computes, from stored logits of these rows only.

    Args:
        logits: fp32 [N, V].
        teacher_logits: fp32 [N, V]; no gradient.
        kind, beta, temperature: as in `linear_kl`.

    Returns:
        [N], in nats.

    Source: (T1)-(T3).
    """
    s = (logits / temperature).log_softmax(-1)
    t = (teacher_logits.detach() / temperature).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if kind != "js":
        return kl(t, s) if kind == "forward" else kl(s, t)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * kl(t, m) + (1.0 - beta) * kl(s, m)
