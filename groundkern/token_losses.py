"""Losses on visual tokens: BASIC's teacher weights and directions, and patch-text contrast.

As in `losses`, every function returns one value per row, in fp32 (fp64 input stays fp64), and
equations are numbered on the pages of docs/methods.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.precision import accumulation_dtype


def teacher_weights(depth: int) -> list[float]:
    """BASIC's weight of each of the first layers, later ones more.

    Equals `[n**2 / sum(m**2 for m in 1..depth) for n in 1..depth]`.

    Args:
        depth: k of (B1), at least 1.

    Returns:
        `depth` numbers whose sum is 1.

    Raises:
        ValueError: a depth below 1.

    Source: BASIC (arXiv 2508.06895), (B1).
    """
    require(depth >= 1, "depth", "at least one layer", depth)
    squares = [number**2 for number in range(1, depth + 1)]
    return [square / sum(squares) for square in squares]


def direction(student: Tensor, teacher: Tensor) -> Tensor:
    """BASIC's squared distance between the directions of two vectors.

    Equals `(F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)`, which
    is `2 - 2 * F.cosine_similarity(student, teacher, dim=-1)` and loses no digit where they agree.

    Args:
        student: [..., D] float, differentiable.
        teacher: [..., D] float; no gradient.

    Returns:
        [...] fp32 in [0, 4]; a zero vector has no direction: it is at distance 1 from all others,
        and gets no gradient.

    Raises:
        ValueError: the two shapes differ.

    Source: BASIC (arXiv 2508.06895), (B2).
    """
    wanted = f"the shape of `student`, {list(student.shape)}"
    require(teacher.shape == student.shape, "teacher", wanted, list(teacher.shape))
    student = student.to(accumulation_dtype(student.dtype))
    some = (student != 0).any(-1, keepdim=True)
    student = torch.where(some, student, student.detach())
    teacher = teacher.detach().to(student.dtype)
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)


def contrast(logits: Tensor, match: Tensor, valid: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy among a row's own candidates, of which one or several are right.

    Equals `-log_softmax(logits / temperature)[match].mean()` of each row, where the softmax is over
    its valid candidates alone.

    Args:
        logits: [..., W] float, differentiable; those that are not valid may be anything, NaN too.
        match: bool [..., W], the right candidates, which share the target evenly.
        valid: bool [..., W], the candidates; what is not valid is right for no row.
        temperature: tau, above 0.

    Returns:
        [...] fp32, in nats; 0 with a zero gradient for a row without a right candidate.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0.

    Source: (B4), (B5).
    """
    for name, x in (("match", match), ("valid", valid)):
        if x.shape != logits.shape:
            fail(name, f"the shape of `logits`, {list(logits.shape)}", list(x.shape))
    require(temperature > 0, "temperature", "a number above 0", temperature)
    if logits.shape[-1] == 0:
        return logits.to(accumulation_dtype(logits.dtype)).sum(-1)
    match = match & valid
    z = logits.to(accumulation_dtype(logits.dtype)) / temperature
    z = z.masked_fill(~valid, torch.finfo(z.dtype).min)  # finite: a row may have no candidate
    log_p = z.log_softmax(-1).masked_fill(~match, 0.0)
    return -log_p.sum(-1) / match.sum(-1).clamp_min(1)
