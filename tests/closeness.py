"""The one tolerance rule: no further from the truth than torch in the same dtype, within a factor.

err(ours, fp64) <= factor * err(torch in our dtype, fp64) + eps * max|truth|
"""

import torch
from torch import Tensor

VALUES, GRADIENTS = 2.0, 3.0


def measured(ours: Tensor, naive: Tensor, truth: Tensor, factor: float) -> tuple[float, float]:
    """(error, what is allowed) of one result; infinities must agree exactly.

    Args:
        ours: the result under test.
        naive: plain torch in the same dtype.
        truth: plain torch in fp64.
        factor: `VALUES` or `GRADIENTS`.
    """
    if ours.numel() == 0:
        return 0.0, 0.0
    eps = torch.finfo(ours.dtype).eps
    ours, naive, truth = (x.detach().double() for x in (ours, naive, truth))
    finite = truth.isfinite()
    if not torch.equal(ours[~finite], truth[~finite]) or not ours[finite].isfinite().all():
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    error = (ours - truth)[finite].abs().max()
    allowed = factor * (naive - truth)[finite].abs().nan_to_num(nan=torch.inf).max()
    return float(error), float(allowed + eps * truth[finite].abs().max())


def assert_close(name: str, ours: Tensor, naive: Tensor, truth: Tensor, factor: float) -> None:
    """Hold `ours` to the rule (arguments as in `measured`).

    Args:
        name: what is compared, for the message.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    error, allowed = measured(ours, naive, truth, factor)
    assert error < float("inf"), f"{name}: not finite where the truth is, or infinities differ"
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"
