"""Calls of linear KL that tests and benchmarks share."""

from collections.abc import Callable
from dataclasses import replace

import torch

from groundkern.ops.cases import Call, randn
from groundkern.ops.linear_kl.api import linear_kl

TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")


def call(
    dtype,
    device,
    *,
    rows: int = 7,
    vocabulary: int = 97,
    dim: int = 24,
    teacher_dim: int = 40,
    teacher_dtype: torch.dtype | None = None,
    bias: bool = False,
    **options,
) -> Call:
    """Heads of different hidden sizes."""
    given = {"dtype": teacher_dtype or dtype, "device": device}
    inputs = {
        "hidden": randn(1, rows, dim, dtype=dtype, device=device),
        "weight": randn(2, vocabulary, dim, dtype=dtype, device=device),
        "teacher_hidden": randn(3, rows, teacher_dim, **given),
        "teacher_weight": randn(4, vocabulary, teacher_dim, **given),
    }
    if bias:
        inputs["bias"] = randn(5, vocabulary, dtype=dtype, device=device)
        inputs["teacher_bias"] = randn(6, vocabulary, **given)
    return Call(linear_kl, inputs, options, fixed=TEACHER)


def _mask(device) -> torch.Tensor:
    return torch.tensor([True, False, True, True, False, True, True], device=device)


def _row_weight(device) -> torch.Tensor:
    return randn(7, 7, dtype=torch.float32, device=device).abs()


def everything(dtype, device, kind: str = "js", reduction: str = "none") -> Call:
    return call(
        dtype,
        device,
        bias=True,
        kind=kind,
        beta=0.3,
        temperature=1.7,
        softcap=3.0,
        teacher_softcap=5.0,
        mask=_mask(device),
        row_weight=_row_weight(device),
        reduction=reduction,
    )


def _certain(dtype, device, kind: str, agreeing: bool = True) -> Call:
    """s -> 1, and t -> 1 at the same entry or at another: the rest is far below fp32's spacing
    at 1."""
    c = call(dtype, device, dim=24, teacher_dim=24, kind=kind, reduction="none")
    weight = randn(2, 97, 24, dtype=dtype, device=device)
    at = torch.arange(7, device=device) * 11
    teacher = weight[at if agreeing else at + 1] * 1.25
    inputs = {"hidden": weight[at] * 1.5, "weight": weight.clone()}
    inputs |= {"teacher_hidden": teacher, "teacher_weight": weight.clone()}
    return replace(c, inputs=inputs)


def _common_logit(dtype, device) -> Call:
    """Every logit has 2^24 on top (fp16: 2^15), unseen by a softmax; even integers keep fp32
    logits exact."""
    c = call(dtype, device, bias=True, kind="js", reduction="none")
    inputs = {}
    for name, x in c.inputs.items():
        if name.endswith("bias"):
            inputs[name] = torch.full_like(x, 2.0 ** (15 if dtype == torch.float16 else 24))
            continue
        inputs[name] = torch.zeros_like(x)
        step = 1 if name.endswith("hidden") else 2
        inputs[name][:, :4] = x[:, :4].round().clamp(-1, 1) * step
    return replace(c, inputs=inputs)


def _identical(dtype, device) -> Call:
    """One head twice: the loss and its gradient are 0 up to rounding."""
    c = call(dtype, device, teacher_dim=24, kind="js", reduction="none")
    student = {n: c.inputs[n] for n in ("hidden", "weight")}
    return replace(c, inputs={**student, **{f"teacher_{n}": x.clone() for n, x in student.items()}})


def _absent_entries(dtype, device, kind: str) -> Call:
    """A bias of -inf pads the vocabulary of both heads, and further the teacher's."""
    c = call(dtype, device, bias=True, kind=kind, reduction="none")
    inputs = {n: x.clone() for n, x in c.inputs.items()}
    inputs["bias"][90:], inputs["teacher_bias"][83:] = -torch.inf, -torch.inf
    return replace(c, inputs=inputs)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _leading_shape(dtype, device) -> Call:
    """And a teacher in fp32 whatever the student is in."""
    options = {"mask": _mask(device)[:6].view(2, 3), "reduction": "none"}
    c = call(dtype, device, rows=6, teacher_dtype=_wider(dtype), **options)
    inputs = {n: x.view(2, 3, -1) if n.endswith("hidden") else x for n, x in c.inputs.items()}
    return replace(c, inputs=inputs)


def _strided(dtype, device) -> Call:
    c = call(dtype, device, kind="reverse", mask=_mask(device))
    wide = {
        "hidden": randn(1, 7, 48, dtype=dtype, device=device)[:, ::2],
        "weight": randn(2, 24, 97, dtype=dtype, device=device).t(),
        "teacher_hidden": randn(3, 40, 7, dtype=dtype, device=device).t(),
        "teacher_weight": randn(4, 97, 80, dtype=dtype, device=device)[:, ::2],
    }
    return replace(c, inputs=wide)


CASES: dict[str, Callable[[torch.dtype, torch.device], Call]] = {
    "forward": call,
    "js": lambda t, d: call(t, d, kind="js"),
    "everything": everything,
    "everything_forward": lambda t, d: everything(t, d, "forward", "mean"),
    "everything_reverse": lambda t, d: everything(t, d, "reverse", "sum"),
    "certain_forward": lambda t, d: _certain(t, d, "forward"),
    "certain_reverse": lambda t, d: _certain(t, d, "reverse"),
    "certain_js": lambda t, d: _certain(t, d, "js"),
    "certain_elsewhere": lambda t, d: _certain(t, d, "js", agreeing=False),
    "common_logit": _common_logit,
    "identical": _identical,
    "absent_entries": lambda t, d: _absent_entries(t, d, "forward"),
    "absent_entries_js": lambda t, d: _absent_entries(t, d, "js"),
    "leading_shape": _leading_shape,
    "strided": _strided,
    "no_row_counts": lambda t, d: call(t, d, mask=torch.zeros(7, dtype=torch.bool, device=d)),
    "no_rows": lambda t, d: call(t, d, rows=0),
    "one_row": lambda t, d: call(t, d, rows=1, kind="reverse", temperature=0.5),
    "one_entry": lambda t, d: call(t, d, vocabulary=1, kind="reverse", reduction="none"),
}
