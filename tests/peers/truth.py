"""What the suites compare with: a head and its losses in plain torch, with the logits stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """[..., V] in x's dtype, capped in fp32."""
    z = F.linear(x, weight, bias)
    if softcap is None:
        return z
    return softcap * torch.tanh((z if z.dtype == torch.float64 else z.float()) / softcap)


def with_z_loss(
    z: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The loss and its z loss, in fp32. The latter has no class weight, and its mean is over the
    rows that count."""
    z = z.float()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(z, target, class_weight, reduction=reduction, **options)
    counted = target != ignore_index
    z_loss = torch.where(counted, lse_square_scale * z.logsumexp(-1) ** 2, 0.0)
    if reduction != "none":
        z_loss = z_loss.sum() / (counted.sum() if reduction == "mean" else 1)
    return loss + z_loss, z_loss


def generalized_jsd(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) of teacher P and student Q with M = beta P +
    (1 - beta) Q; KL(P || Q) for beta = 0, KL(Q || P) for beta = 1. Mean over the rows that count,
    0 without any."""
    log_q, log_p = ((z.float() / temperature).log_softmax(-1) for z in (student, teacher))
    if beta == 0.0:
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif beta == 1.0:
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        rows = beta * (log_p.exp() * (log_p - log_m)).sum(-1)
        rows = rows + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    if label is None:
        return rows.mean()
    counted = label != ignore_index
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp(min=1)


def some_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """A random number of rows, at least one and fewer than half, are ignored."""
    count = int(torch.randint(1, max(2, len(target) // 2), (1,)))
    target[torch.randperm(len(target))[:count]] = ignore_index
    return target
