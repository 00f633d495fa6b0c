"""A case: a test of another library with one choice of its parameters, and what checks it."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groundkern import backends

Values = Mapping[str, Any]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS["fp64"] = torch.float64


@dataclass(frozen=True)
class Case:
    suite: str
    test: str  # its name in the suite
    values: Values
    check: Callable[[Values], None]  # raises AssertionError where results differ
    small: Callable[[Values], Values]  # the same at a size for CI

    def run(self, full: bool) -> None:
        torch.manual_seed(self.values.get("seed", 0))
        self.check(self.values if full else self.small(self.values))

    @property
    def name(self) -> str:
        parts = (f"{name}={value}" for name, value in self.values.items())
        return f"{self.test}[{', '.join(parts)}]"


def same_size(values: Values) -> Values:
    return values


def grid(
    suite: str,
    test: str,
    check: Callable[[Values], None],
    axes: Mapping[str, list],
    small: Callable[[Values], Values] = same_size,
    **fixed: Any,
) -> list[Case]:
    """Every choice of the axes; an axis named "B T V" has tuples of three values."""
    cases = []
    for choice in itertools.product(*axes.values()):
        values = dict(fixed)
        for names, value in zip(axes, choice):
            names = names.split()
            values.update(zip(names, value if len(names) > 1 else (value,)))
        cases.append(Case(suite, test, values, check, small))
    return cases


def some(cases: list[Case], most: int) -> list[Case]:
    """About `most` cases of one test: in them stands every value of every parameter, and as many
    pairs of values as fit."""
    drawn = random.Random(0).sample(cases, len(cases))
    left = [(case, _values(case)) for case in drawn]
    unseen = set().union(*(values for _, values in left))
    chosen, seen = [], set()
    while left and (unseen or len(chosen) < most):
        pool = [pair for pair in left if pair[1] & unseen] if unseen else left[:POOL]
        best = max(pool[:POOL], key=lambda pair: len(_pairs(pair[1]) - seen))
        left.remove(best)
        chosen.append(best[0])
        unseen -= best[1]
        seen |= _pairs(best[1])
    return chosen


POOL = 60  # candidates that are compared


def _values(case: Case) -> set:
    return {(name, str(value)) for name, value in case.values.items()}


def _pairs(values: set) -> set:
    return set(itertools.combinations(sorted(values), 2))


@contextmanager
def served_by(backend: str) -> Iterator[list[str]]:
    """Calls on a CPU prefer a backend; which one served each."""
    before, choose, served = backends._PREFERRED, backends.choose, []

    def noting(*arguments):
        served.append(choose(*arguments))
        return served[-1]

    backends._PREFERRED, backends.choose = {**before, "cpu": backend}, noting
    try:
        yield served
    finally:
        backends._PREFERRED, backends.choose = before, choose


def assert_allclose(name: str, ours: Tensor, truth: Tensor, atol: float, rtol: float) -> None:
    """|ours - truth| <= atol + rtol |truth|, elementwise."""
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    ours, truth = ours.detach().double(), truth.detach().double()
    if not torch.allclose(ours, truth, atol=atol, rtol=rtol, equal_nan=True):
        excess = (ours - truth).abs() - atol - rtol * truth.abs()
        raise AssertionError(f"{name}: {float(excess.max()):.3e} over atol={atol}, rtol={rtol}")


def rounds_before_products(dtype: torch.dtype) -> bool:
    """Whether native kernels serve this call on a CPU that multiplies bf16, so that the gradient
    of the logits is rounded before it is multiplied, as torch's own is: it is then held to torch's,
    by the rule of tests/closeness.py, where a suite holds each element to a gradient that was not
    rounded. The reference keeps to the suite's own bound."""
    native = backends._PREFERRED["cpu"] == "native"
    return native and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def assert_no_further(
    name: str, ours: Tensor, theirs: Tensor, truth: Tensor, allowed: float
) -> None:
    """|ours - truth| <= |theirs - truth| + allowed, elementwise."""
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    ours, theirs, truth = (x.detach().double() for x in (ours, theirs, truth))
    excess = (ours - truth).abs() - (theirs - truth).abs() - allowed
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0, f"{name}: {worst:.3e} over torch's own error + {allowed}"


def assert_largest(
    name: str, ours: Tensor, theirs: Tensor, truth: Tensor, factor: float, allowed: float
) -> None:
    """max|ours - truth| < factor max|theirs - truth| + allowed."""
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    ours, theirs, truth = (x.detach().double() for x in (ours, theirs, truth))
    error, bound = (ours - truth).abs().max(), factor * (theirs - truth).abs().max() + allowed
    assert error < bound, f"{name}: error {float(error):.3e}, allowed {float(bound):.3e}"


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    """Copies that want a gradient."""
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def gradients(loss: Tensor, *wanted: Tensor | None, upstream: Tensor | None = None) -> list[Tensor]:
    wanted = [x for x in wanted if x is not None]
    return list(torch.autograd.grad(loss, wanted, upstream))
