"""The public function `linear_kl`."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from groundkern import backends, checks
from groundkern.ops.linear_kl import Inputs, Options, op
from groundkern.precision import accumulation_dtype, autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Kind = Literal["forward", "reverse", "js"]
Head = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight and bias

KINDS = ("forward", "reverse", "js")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence between a teacher's and a student's distribution over the vocabulary, row by row;
    neither head's logits are ever stored whole.

    With s and t the log-probabilities of student and teacher, "forward" equals
    `F.kl_div(s, t, reduction="none", log_target=True).sum(-1)` and "reverse" the same of (t, s),
    where `s = (F.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)`.

    The teacher is a constant: no gradient reaches its tensors, even where they are the student's.
    The loss has no factor temperature^2, as some recipes do: multiply by it if yours does.

    Args:
        hidden: [..., D], the student's. fp32, bf16, fp16 (fp64 in the reference); sums and the
            result are fp32.
        weight: [V, D], the student's un-embedding, in hidden's dtype (autocast casts all operands).
        teacher_hidden: [..., Dt], hidden's leading shape; its dtype may be another.
        teacher_weight: [V, Dt], in teacher_hidden's dtype.
        bias: [V], in hidden's dtype.
        teacher_bias: [V], in teacher_hidden's dtype.
        kind: "forward", KL(teacher || student); "reverse", KL(student || teacher); "js",
            beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student.
        beta: in (0, 1), of "js".
        temperature: both heads' logits are divided by it, after the softcap.
        softcap: the student's logits become `softcap * tanh(logits / softcap)`.
        teacher_softcap: the same of the teacher's.
        mask: bool [...], rows that count; the others are 0 and get no gradient.
        row_weight: [...] float, multiplies each row's loss; no gradient.
        reduction: "mean" divides the weighted sum by the number of counted rows (0 when there is
            none), "sum", or "none".
        group: process group over whose ranks the rows of both weights (and biases) are sharded in
            rank order, both alike; the hidden states are the same on every rank.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        Scalar, or [...] with reduction "none": fp32, differentiable in hidden, weight and bias.

    Raises:
        ValueError: mismatched shapes; an unknown kind or reduction; a beta, temperature or softcap
            out of range; a backend that cannot serve the call.
        TypeError: mismatched dtypes.

    Source: Hinton et al., arXiv 1503.02531; GKD's generalised Jensen-Shannon divergence, arXiv
        2306.13649; equations (T1)-(T4).
    """
    checks.require(kind in KINDS, "kind", "'forward', 'reverse' or 'js'", repr(kind))
    wanted = "'mean', 'sum' or 'none'"
    checks.require(reduction in ("mean", "sum", "none"), "reduction", wanted, reduction)
    checks.require(0.0 < beta < 1.0, "beta", "a share in (0, 1)", beta)
    good = isinstance(temperature, float | int) and 0.0 < temperature < float("inf")
    checks.require(good, "temperature", "a positive finite number", temperature)
    checks.finite_positive("softcap", softcap)
    checks.finite_positive("teacher_softcap", teacher_softcap)
    student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    inputs, counted = _prepare(student, teacher, mask)
    shape, device = hidden.shape[:-1], inputs.hidden.device
    if row_weight is not None and row_weight.shape != shape:
        wanted = f"hidden's leading shape {list(shape)}"
        checks.fail("row_weight", wanted, list(row_weight.shape))
    factor = _row_factor(inputs.hidden, counted, row_weight, reduction)
    name = backends.choose(backend, device, lambda b: op.kernels(b).unsupported(inputs, group))
    caps = (softcap or 0.0, teacher_softcap or 0.0)
    options = Options(
        kind, float(beta), float(temperature), *caps, "" if group is None else group.group_name
    )
    arguments = (*inputs, counted, *options)
    train_weight = inputs.weight.requires_grad
    trained = train_weight or (inputs.bias is not None and inputs.bias.requires_grad)
    ahead = torch.is_grad_enabled() and (trained or inputs.hidden.requires_grad)
    ahead = ahead and op.gradients_in_forward(name)
    if ahead and reduction != "none":
        return op.linear_kl_with_gradients(*arguments, factor, train_weight, name)[0]
    if ahead and not trained:
        loss = op.linear_kl_with_gradients(*arguments, None, False, name)[0]
    else:
        loss = op.linear_kl(*arguments, name)
    loss = loss * factor
    return loss.view(shape) if reduction == "none" else loss.sum()


def _prepare(student: Head, teacher: Head, mask: Tensor | None) -> tuple[Inputs, Tensor | None]:
    """Checked operands with flat rows, and the rows that count, bool [N]."""
    sizes: dict[str, int] = {}
    ready: list[Head] = []
    shape, device = student[0].shape[:-1], student[0].device
    for prefix, dim, operands in (("", "D", student), ("teacher_", "Dt", teacher)):
        for argument, x in zip(("hidden", "weight", "bias"), operands, strict=True):
            if hasattr(x, "full_tensor"):
                wanted = "a plain tensor: its full_tensor(), or its local rows with `group`"
                checks.fail(prefix + argument, wanted, "a DTensor", TypeError)
        hidden, weight, bias = autocast(*operands)
        if hidden.dim() < 1 or hidden.shape[:-1] != shape:
            wanted = f"hidden's leading shape {list(shape)}"
            checks.fail(f"{prefix}hidden", wanted, list(hidden.shape[:-1]))
        flat = hidden.reshape(-1, hidden.shape[-1])
        like: dict[str, Any] = {"dtype": hidden.dtype, "device": device}
        checks.tensor(
            f"{prefix}hidden", flat, f"N {dim}", sizes, dtype=checks.FLOATS, device=device
        )
        checks.tensor(f"{prefix}weight", weight, f"V {dim}", sizes, **like)
        if bias is not None:
            checks.tensor(f"{prefix}bias", bias, "V", sizes, **like)
        ready.append((flat, weight, bias))
    trained, (x, w, b) = ready
    inputs = Inputs(*trained, x.detach(), w.detach(), None if b is None else b.detach())
    if mask is None:
        return inputs, None
    if mask.shape != shape:
        checks.fail("mask", f"hidden's leading shape {list(shape)}", list(mask.shape))
    counted = mask.reshape(-1)
    checks.tensor("mask", counted, "N", sizes, dtype=torch.bool, device=device)
    return inputs, counted


def _row_factor(
    hidden: Tensor, counted: Tensor | None, row_weight: Tensor | None, reduction: str
) -> Tensor:
    """What each row's loss is multiplied by: fp32 (fp64) [N], 0 where it does not count."""
    wide = accumulation_dtype(hidden.dtype)
    if row_weight is None:
        factor = torch.ones(hidden.shape[:1], dtype=wide, device=hidden.device)
    else:
        factor = row_weight.detach().to(wide).reshape(-1)
    if counted is not None:
        factor = factor.masked_fill(~counted, 0.0)
    if reduction == "mean":
        rows = max(1, hidden.shape[0]) if counted is None else counted.sum().clamp(min=1)
        factor = factor / rows
    return factor
