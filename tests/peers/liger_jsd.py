"""Liger-Kernel 0.8.2, test/transformers/test_fused_linear_jsd.py: 58 cases.

A student's head of half the teacher's dimensions; weights and hidden states uniform in [0, 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.compat import liger
from tests.peers import truth
from tests.peers.case import FLOATS, Values, assert_allclose, gradients, grid, leaves

SUITE = "Liger fused linear JSD"
SHAPES = {"B T H V": [(8, 128, 1024, 4096), (4, 423, 167, 1423)]}
TOLERANCES = {"dtype atol rtol": [("bf16", 5e-3, 5e-2), ("fp32", 1e-5, 5e-4)]}


def small(values: Values) -> Values:
    size = {(8, 128, 1024): (2, 32, 64, 256), (4, 423, 167): (4, 11, 41, 89)}
    shape = size.get((values["B"], values["T"], values["H"]), (2, 4, 128, 200))
    return {**values, **dict(zip("BTHV", shape))} if values["H"] > 41 else values


def _draw(v: Values, hidden: torch.dtype, weights: torch.dtype):
    """Student's x [N, H / 2] and weight, teacher's x [N, H] and weight, labels [N] or None."""
    count, scale = v["B"] * v["T"], v.get("scale", 1.0)
    weight = torch.rand(v["V"], v["H"] // 2, dtype=weights)
    teacher_weight = torch.rand(v["V"], v["H"], dtype=weights)
    x = torch.rand(count, v["H"] // 2, dtype=hidden) * scale
    teacher = torch.rand(count, v["H"], dtype=hidden) * scale
    if v["labels"] == "none":
        return x, weight, teacher, teacher_weight, None
    labels = torch.randint(0, v["V"], (count,))
    if v["labels"] == "all":
        labels.fill_(v["ignore_index"])
    else:
        labels = truth.some_ignored(labels, v["ignore_index"])
    return x, weight, teacher, teacher_weight, labels


def _plain(x, weight, teacher, teacher_weight, labels, v: Values) -> Tensor:
    student = F.linear(x, weight).float()
    options = (v["beta"], v["temperature"], v["ignore_index"])
    return truth.generalized_jsd(student, F.linear(teacher, teacher_weight), labels, *options)


def check(v: Values) -> None:
    x, weight, *rest = _draw(v, FLOATS[v["dtype"]], FLOATS[v["dtype"]])
    ours, theirs = leaves(x, weight), leaves(x, weight)
    module = liger.LigerFusedLinearJSD(v["beta"], v["ignore_index"], v["temperature"])
    loss, expected = module(*ours, *rest), _plain(*theirs, *rest, v)
    assert_allclose("loss", loss, expected, v["atol"], v["rtol"])
    if v["labels"] == "all":
        assert float(loss.detach()) == 0 and all((g == 0).all() for g in gradients(loss, *ours))
        return
    for name, a, b in zip(("dx", "dweight"), gradients(loss, *ours), gradients(expected, *theirs)):
        assert_allclose(name, a, b, v["atol"], v["rtol"])


def check_functional(v: Values) -> None:
    """The function, its arguments by name, against the module and torch."""
    x, weight, teacher, teacher_weight, labels = _draw(v, *[FLOATS[v["dtype"]]] * 2)
    ours, others, theirs = leaves(x, weight), leaves(x, weight), leaves(x, weight)
    options = {"jsd_beta": v["beta"], "temperature": v["temperature"]}
    options |= {"ignore_index": v["ignore_index"], "accum_dtype": FLOATS.get(v["accum_dtype"])}
    loss = liger.liger_fused_linear_jsd(
        student_input=ours[0],
        student_weight=ours[1],
        teacher_input=teacher,
        teacher_weight=teacher_weight,
        shift_labels=labels,
        **options,
    )
    other = liger.LigerFusedLinearJSD(**options)(*others, teacher, teacher_weight, labels)
    expected = _plain(*theirs, teacher, teacher_weight, labels, v)
    sides = ((loss, ours), (other, others), (expected, theirs))
    results = [[total, *gradients(total, *operands)] for total, operands in sides]
    for a, b, c in zip(*results):
        assert_allclose("function and module", a, b, v["atol"], v["rtol"])
        assert_allclose("function and torch", a, c, v["atol"], v["rtol"])


def check_autocast(v: Values) -> None:
    """fp32 weights, hidden states in autocast's dtype, both passes under autocast."""
    dtype = FLOATS[v["autocast_dtype"]]
    x, weight, *rest = _draw(v, dtype, torch.float32)
    ours, theirs = leaves(x, weight), leaves(x, weight)
    module = liger.LigerFusedLinearJSD(v["beta"], v["ignore_index"], v["temperature"])
    with torch.autocast("cpu", dtype):
        loss, expected = module(*ours, *rest), _plain(*theirs, *rest, v)
        pairs = zip(gradients(loss, *ours), gradients(expected, *theirs))
    assert_allclose("loss", loss, expected, v["atol"], v["rtol"])
    for a, b in pairs:
        assert_allclose("gradient", a, b, v["atol"], v["rtol"])


BETAS = [(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)]
IGNORED = [(1.0, 0.5, 2), (1.0, 0.0, 2), (2.0, 0.1, 42), (1.0, 1.0, 2)]
NAMES = "temperature beta ignore_index"
CASES = [
    *grid(
        SUITE,
        "test_correctness",
        check,
        {**SHAPES, **TOLERANCES, "temperature beta": BETAS},
        small,
        seed=42,
        labels="none",
        ignore_index=-100,
    ),
    *grid(
        SUITE,
        "test_correctness_with_ignore_index",
        check,
        {**SHAPES, **TOLERANCES, NAMES: IGNORED},
        small,
        seed=42,
        labels="some",
    ),
    *grid(
        SUITE,
        "test_correctness_functional",
        check_functional,
        {
            "B T H V": [(2, 2, 8, 8), (9, 7, 41, 41)],
            **TOLERANCES,
            NAMES: [(1.0, 0.5, -100), (2.0, 0.1, 42)],
            "accum_dtype": [None, "fp32"],
        },
        small,
        seed=42,
        labels="some",
        scale=0.5,
    ),
    *grid(
        SUITE,
        "test_correctness_all_ignored",
        check,
        {**SHAPES, **TOLERANCES, NAMES: [(1.0, 0.5, 2), (2.0, 0.1, 42)]},
        small,
        seed=42,
        labels="all",
    ),
    *grid(
        SUITE,
        "test_amp",
        check_autocast,
        {"B T H V": [(2, 4, 2048, 3200)], "autocast_dtype": ["bf16", "fp16"]},
        small,
        seed=42,
        labels="some",
        temperature=1.0,
        beta=0.5,
        ignore_index=-100,
        atol=5e-3,
        rtol=5e-2,
    ),
]
