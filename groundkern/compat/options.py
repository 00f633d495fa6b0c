"""What the adapters share: checks of options that have no effect, and means over no rows."""

import torch
from torch import Tensor

from groundkern import checks
from groundkern.precision import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: object) -> None:
    checks.require(reduction in REDUCTIONS, "reduction", "'mean', 'sum' or 'none'", repr(reduction))


def check_share(name: str, x: float) -> None:
    checks.require(0.0 <= x <= 1.0, name, "a share in [0, 1]", x)


def check_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        checks.fail(name, "True or False", repr(x), TypeError)


def check_float_dtype(name: str, x: object) -> None:
    """None or a dtype of floating-point numbers."""
    good = x is None or (isinstance(x, torch.dtype) and x.is_floating_point)
    if not good:
        checks.fail(name, "None or a floating-point torch.dtype", repr(x), TypeError)


def check_head(names: tuple[str, str, str], hidden: object, weight: object, bias: object) -> None:
    """Hold a call's [..., D], [V, D] and [V] or None to each other, under the caller's names."""
    if not isinstance(hidden, Tensor):
        checks.fail(names[0], "a tensor [..., D]", type(hidden).__name__, TypeError)
    checks.require(hidden.dim() > 0, names[0], "shape [..., D]", list(hidden.shape))
    sizes = {"D": hidden.shape[-1]}
    same = None if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    checks.tensor(names[1], weight, "V D", sizes, dtype=same, device=hidden.device)
    if bias is not None:
        checks.tensor(names[2], bias, "V", sizes, dtype=same, device=hidden.device)


def check_labels(name: str, labels: object, of: str, hidden: Tensor) -> None:
    """Labels int64 [...] of hidden [..., D], whose name is `of`."""
    shape = list(hidden.shape[:-1])
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        checks.fail(name, "a tensor of torch.int64", getattr(labels, "dtype", labels), TypeError)
    wanted = f"{of}'s leading shape {shape}"
    checks.require(list(labels.shape) == shape, name, wanted, list(labels.shape))


def check_class_weight(name: str, weight: Tensor | None, classes: int) -> Tensor | None:
    """Class weights [V] of any floating dtype, as groundkern wants them: fp32 (fp64)."""
    if weight is None:
        return None
    checks.tensor(name, weight, "V", {"V": classes})
    if not weight.is_floating_point():
        checks.fail(name, "a floating-point tensor", weight.dtype, TypeError)
    if weight.requires_grad and torch.is_grad_enabled():
        checks.fail(name, "a tensor without gradient, such as its detach()", "one that requires it")
    return weight.to(accumulation_dtype(weight.dtype))


def nan_if_zero(loss: Tensor, divisor: Tensor) -> Tensor:
    """A mean over nothing is 0 / 0 for these libraries; its gradient is that of 0."""
    return loss + torch.where(divisor == 0, torch.nan, 0.0).to(loss.dtype)
