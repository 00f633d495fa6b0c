"""cut-cross-entropy 25.6.4, tests/: what needs one process, 2,931 cases.

Their rule: no element is further from fp32 than plain torch in the same dtype, plus a tolerance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.compat import cut_cross_entropy as cce
from tests.peers import truth
from tests.peers.case import FLOATS, Values, assert_no_further, gradients, grid, leaves

SUITE = "cut-cross-entropy"
SHAPES = {"N V D": [(256, 512, 128), (252, 507, 128), (252, 507, 123)]}
ODD = {"N V D": [(256, 512, 128), (255, 507, 128), (255, 507, 123)]}
BOTH = [False, True]
SOFTCAPS = {"softcap": [None, 20.0]}
REDUCTIONS = ["none", "mean", "sum"]


def small(values: Values) -> Values:
    shape = {128: (64, 96, 32), 123: (60, 91, 27)}[values["D"]]
    shape = shape if values["V"] == 512 else (60, 91, shape[2])
    return {**values, **dict(zip("NVD", shape))}


def _draw(v: Values, bias_scale: float):
    """e [N, D], c [V, D], the first rows of which are rows of e, bias [V] and targets [N]."""
    count, size, dim, dtype = v["N"], v["V"], v["D"], FLOATS[v["dtype"]]
    e = torch.randn(count, dim, dtype=dtype) / dim**0.5
    c = torch.randn(size, dim, dtype=dtype)
    c[: min(count, size) // 2] = e[: min(count, size) // 2]
    bias = torch.randn(size, dtype=dtype) * bias_scale if v["bias"] else None
    targets = torch.randint(0, size, (count,))
    if v.get("invalids"):
        targets[torch.randperm(count)[: int(0.2 * count)]] = -100
    return e, c, bias, targets


def _plain(e, c, targets, bias, v: Values) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp of [4, T - shift] rows, and their targets, in e's dtype."""
    shift = int(v.get("shift", 0))
    if shift:
        e, targets = e[:, :-shift], targets[:, shift:]
    z = truth.logits(e, c, bias, v["softcap"]).float()
    reduction = v.get("reduction", "none")
    loss = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction=reduction)
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss, z.logsumexp(-1), targets


def _four(e: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return e.view(4, -1, e.shape[-1]), targets.view(4, -1)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.float() for x in tensors]


def check_forward(v: Values) -> None:
    e, c, bias, targets = _draw(v, 0.01)
    e, targets = _four(e, targets)
    loss = cce.linear_cross_entropy(
        e,
        c,
        targets,
        bias=bias,
        softcap=v["softcap"],
        shift=v["shift"],
        reduction="none",
        impl=v["impl"],
    )
    wide_e, wide_c, wide_bias = _wide(e, c, bias)
    exact = _plain(wide_e, wide_c, targets, wide_bias, v)[0]
    assert_no_further("loss", loss, _plain(e, c, targets, bias, v)[0], exact, v["tolerance"])


def _objective(loss: Tensor, lse: Tensor, counted: Tensor, v: Values) -> Tensor:
    """What their test differentiates: the mean of the loss, a sum divided by the rows that count,
    and the mean of the squared log-sum-exp over these."""
    loss = (loss / counted.sum() if v["reduction"] == "sum" else loss).mean()
    return loss + (lse**2 * counted).sum() / counted.sum() if v["z_loss"] else loss


def check_backward(v: Values) -> None:
    e, c, bias, targets = _draw(v, 0.02)
    e, targets = _four(e, targets)
    everything = []
    for dtype in (torch.float32, e.dtype):
        e_, c_, bias_ = (None if x is None else x.to(dtype) for x in (e, c, bias))
        operands = leaves(e_, c_, bias_)
        loss, lse, kept = _plain(operands[0], operands[1], targets, operands[2], v)
        total = _objective(loss, lse, kept != -100, v)
        everything.append(gradients(total, *operands))
    ours = leaves(e, c, bias)
    options = {name: v[name] for name in ("softcap", "shift", "reduction", "impl")}
    result = cce.linear_cross_entropy(
        ours[0], ours[1], targets, ours[2], return_lse=v["z_loss"], **options
    )
    loss, lse = result if v["z_loss"] else (result, None)
    counted = targets[:, int(v["shift"]) :] != -100
    total = _objective(loss, lse, counted, {**v, "z_loss": False})
    if v["z_loss"]:
        total = total + cce.compute_z_loss(lse, targets, v["shift"])
    exact, theirs = everything
    for name, a, b, x in zip(("de", "dc", "dbias"), gradients(total, *ours), theirs, exact):
        assert_no_further(name, a, b, x, v["tolerance"])


def check_partials(v: Values) -> None:
    """Gradients of what wants one, and of nothing else."""
    e, c, bias, targets = _draw({**v, "dtype": "bf16", "bias": True}, 0.01)
    e, targets = _four(e, targets)
    wanted = (v["de"], v["dc"], v["dbias"])
    for x, flag in zip((e, c, bias), wanted):
        x.requires_grad_(flag)
    cce.linear_cross_entropy(e, c, targets, bias=bias, reduction="mean").backward()
    assert tuple(x.grad is not None for x in (e, c, bias)) == wanted


def check_lse(v: Values) -> None:
    e, c, bias, targets = _draw(v, 0.02)
    lse = cce.linear_cross_entropy(e, c, targets, bias, softcap=v["softcap"], return_lse=True)[1]
    theirs = truth.logits(e, c, bias, v["softcap"]).float().logsumexp(-1)
    exact = truth.logits(*_wide(e, c, bias), v["softcap"]).logsumexp(-1)
    assert_no_further("lse", lse, theirs, exact, 1e-5)


def check_z_loss(v: Values) -> None:
    """The squares of 1 to 10, of which two rows count where some are invalid."""
    lse, shift = torch.arange(1, 11, dtype=torch.float64), int(v["shift"])
    targets = None
    if v["invalids"]:
        targets = torch.full((len(lse) + shift,), -100)
        targets[[3, 5]] = 1
    z_loss = cce.compute_z_loss(lse, targets, v["shift"], reduction=v["reduction"])
    assert z_loss.shape == (lse.shape if v["reduction"] == "none" else ())
    rows = [4 - shift, 6 - shift] if v["invalids"] else range(1, 11)
    total = z_loss.sum() * (len(rows) if v["reduction"] == "mean" else 1)
    assert torch.isclose(total, total.new_tensor(sum(i**2 for i in rows)))


def _dtypes(fp32: float, fp16: float = 1e-3, bf16: float = 1e-2) -> dict[str, list]:
    return {"dtype tolerance": [("fp32", fp32), ("fp16", fp16), ("bf16", bf16)]}


PARTIALS = [(True, False, True), (False, True, False), (False, False, True)]
KERNELS = {**SOFTCAPS, "bias": BOTH, **ODD}
CASES = [
    *grid(
        SUITE,
        "test_loss_forward",
        check_forward,
        {
            "impl": ["cce", "torch_compile"],
            **_dtypes(1e-5),
            **SOFTCAPS,
            "bias": BOTH,
            "shift": [0, 2],
            "invalids": BOTH,
            **SHAPES,
        },
        small,
    ),
    *grid(
        SUITE,
        "test_loss_backward",
        check_backward,
        {
            "impl": ["cce", "torch_compile", "cce_exact"],
            **_dtypes(5e-4),
            **SOFTCAPS,
            "bias": BOTH,
            "shift": BOTH,
            "invalids": BOTH,
            "reduction": REDUCTIONS,
            "z_loss": BOTH,
            **SHAPES,
        },
        small,
    ),
    *grid(
        SUITE,
        "test_loss_partials",
        check_partials,
        {"de dc dbias": PARTIALS, "N V D": [(256, 512, 128)]},
        small,
    ),
    *grid(SUITE, "test_lse", check_lse, {"dtype": ["fp32", "fp16", "bf16"], **KERNELS}, small),
    *grid(
        SUITE,
        "test_compute_z_loss",
        check_z_loss,
        {"reduction": REDUCTIONS, "shift": BOTH, "invalids": BOTH},
    ),
]
