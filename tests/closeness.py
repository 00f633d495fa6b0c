"""The one tolerance rule: no further from the truth than torch in the same dtype, within a factor.

err(ours, fp64) <= factor * err(torch in our dtype, fp64) + eps * max|truth|
"""

import torch
from torch import Tensor

VALUES, GRADIENTS = 2.0, 3.0


def assert_close(name: str, ours: Tensor, naive: Tensor, truth: Tensor, factor: float) -> None:
    """Hold `ours` to the rule; infinities must agree exactly.

    Args:
        name: what is compared, for the message.
        ours: the result under test.
        naive: plain torch in the same dtype.
        truth: plain torch in fp64.
        factor: `VALUES` or `GRADIENTS`.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    if ours.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    ours, naive, truth = (x.detach().double() for x in (ours, naive, truth))
    finite = truth.isfinite()
    assert torch.equal(ours[~finite], truth[~finite]), f"{name}: infinities differ"
    assert ours[finite].isfinite().all(), f"{name}: not finite where the truth is"
    if not finite.any():
        return
    error = (ours - truth)[finite].abs().max()
    allowed = factor * (naive - truth)[finite].abs().nan_to_num(nan=torch.inf).max()
    allowed = allowed + eps * truth[finite].abs().max()
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"
