"""What every op must do on every backend here: right results, and working with torch's tools."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groundkern import available_backends
from groundkern.ops.attention_map import cases as attention_map_cases
from groundkern.ops.cases import Call, randn
from groundkern.ops.linear_cross_entropy import cases as linear_cross_entropy_cases
from groundkern.ops.linear_kl import cases as linear_kl_cases
from groundkern.ops.side_attention import cases as side_attention_cases
from tests.closeness import GRADIENTS, VALUES, measured
from tests.ops import naive

CASES = {
    f"{op}/{name}": make
    for op, module in (
        ("side_attention", side_attention_cases),
        ("attention_map", attention_map_cases),
        ("linear_cross_entropy", linear_cross_entropy_cases),
        ("linear_kl", linear_kl_cases),
    )
    for name, make in module.CASES.items()
}
BACKENDS = [name for name, why in available_backends().items() if why is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def refusal(case: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend does not serve a case, in its own words; None if it does."""
    try:
        CASES[case](dtype, CPU).run(backend=backend)
    except ValueError as error:
        if not str(error).startswith("`backend`"):
            raise
        return str(error)
    return None


# Asked once per op and backend: a test below checks that all cases of an op are served alike.
FIRST_CASE = {case.split("/")[0]: case for case in reversed(CASES)}
OPS_SERVED = {
    (op, backend)
    for op, case in FIRST_CASE.items()
    for backend in BACKENDS
    if not refusal(case, backend)
}
SERVED = [(c, b) for c in CASES for b in BACKENDS if (c.split("/")[0], b) in OPS_SERVED]
# The interpreter is slow. It widens bf16 and fp16 before a dot, so bf16 stands for both on triton;
# and opcheck, compile and autocast, which do not depend on a case's values, are tried on these
# calls. On a GPU tests/ops/test_gpu_wide.py runs all three dtypes.
TRITON_CALLS = {
    "side_attention/main_statistics",
    "attention_map/map_visible_sets_weights",
    "attention_map/contribution_columns",
    "attention_map/kl_visible_mean",
}
# Of an op with many cases these are tried: scalar losses, losses per row whose gradient has an op
# of its own, every option at once, strides, nothing.
TRIED = {
    "linear_cross_entropy": {
        *("mean", "everything", "log_prob", "leading_shape", "strided", "no_rows", "one_entry"),
        *("all_at_once", "soft_targets", "soft_all_at_once", "entropy"),
    },
    "linear_kl": {"forward", "everything", "strided"},
}


# Of the tried ones `make test` tries these, on every backend or on native alone; `make long` the
# rest. What torch's tools see of a call differs by its options and its empty sizes.
ON_EVERY_BACKEND = {
    *("side_attention/main_statistics", "attention_map/kl_visible_mean"),
    *("linear_cross_entropy/everything", "linear_kl/everything"),
}
ON_NATIVE = {
    "side_attention": {"regions", "underflow", "softcap", "no_rows", "no_sets", "strided"},
    "attention_map": {
        *("map_strided", "map_visible_lse", "map_trained_lse", "map_columns_sets_weights"),
        *("contribution_visible_rectified", "contribution_no_columns", "map_no_rows"),
        *("kl_visible_mean_sets_weights", "kl_columns_each", "kl_trained_lse", "kl_no_rows"),
    },
    **TRIED,
}


def _tried() -> Iterator[Any]:
    for case, backend in SERVED:
        op, name = case.split("/")
        if (backend == "triton" and case not in TRITON_CALLS) or name not in TRIED.get(op, {name}):
            continue
        short = case in ON_EVERY_BACKEND or (backend == "native" and name in ON_NATIVE[op])
        yield pytest.param(case, backend, marks=[] if short else [pytest.mark.long])


def _served_dtypes() -> Iterator[Any]:
    """Backends side by side, which are compared with the same truth. In the attention ops' kernels
    fp16 is fp32 but for how numbers are read and written (csrc/cpu/gathered.h): of their cases
    those that torch's tools are tried on stand for all."""
    for case in CASES:
        op, name = case.split("/")
        few = case in ON_EVERY_BACKEND or name in ON_NATIVE[op] or op.startswith("linear_")
        for dtype in DTYPES:
            marks = [pytest.mark.long] if dtype == torch.float16 and not few else []
            for backend in BACKENDS:
                if (case, backend) in SERVED and (backend, dtype) != ("triton", torch.float16):
                    label = f"{dtype}-{case}-{backend}"
                    yield pytest.param(case, backend, dtype, marks=marks, id=label)


each_case = pytest.mark.parametrize("case", CASES)
each_tried = pytest.mark.parametrize(("case", "backend"), list(_tried()))


@pytest.mark.parametrize(
    ("op", "backend"),
    [  # of an op that is served, test_values_and_gradients runs each case
        pytest.param(op, b, marks=[pytest.mark.long] if (op, b) in OPS_SERVED else [])
        for op in sorted(FIRST_CASE)
        for b in BACKENDS
    ],
)
def test_a_backend_serves_all_cases_of_an_op_or_says_why_not(op: str, backend: str) -> None:
    reasons = {refusal(case, backend) for case in CASES if case.startswith(f"{op}/")}
    assert len(reasons) == 1, reasons
    reason = reasons.pop()
    if reason is not None:
        assert backend != "reference", "the specification serves everything"
        pytest.skip(reason)


def make(case: str, dtype: torch.dtype, backend: str) -> Call:
    """The call on that backend."""
    call = CASES[case](dtype, CPU)
    return replace(call, options={**call.options, "backend": backend})


def leaves(call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The differentiable inputs as new leaves of the same strides."""
    result = {}
    for name, x in call.inputs.items():
        if name not in call.fixed:
            x = x.detach()
            result[name] = (x if dtype is None else x.to(dtype)).requires_grad_()
    return result


def upstream(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Uneven upstream gradients; none into infinities."""
    drawn = [randn(77 + i, *x.shape, dtype=x.dtype, device=x.device) for i, x in enumerate(results)]
    return [torch.where(x.isfinite(), d, 0.0) for x, d in zip(results, drawn, strict=True)]


def differentiate(call: Call, function=None, dtype=None, **options) -> tuple[tuple, list[Tensor]]:
    """(results, gradients of the differentiable inputs)."""
    inputs = leaves(call, dtype)
    results = call.run(function, **inputs, **options)
    outputs = results[: call.differentiable]
    gradients = torch.autograd.grad(
        outputs,
        list(inputs.values()),
        [u.to(o.dtype) for u, o in zip(upstream(outputs), outputs, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    return results, list(gradients)


def oracle(call: Call, dtype: torch.dtype):
    """Plain torch in another dtype: (results, gradients)."""
    options = {k: x for k, x in call.options.items() if k not in ("backend", "lse")}
    plain = replace(call, options=options)
    return differentiate(plain, getattr(naive, call.function.__name__), dtype)


# If a result has only a few elements, plain torch may be right to the bit by luck, and the budget
# is then 0. So fp32 rounding of numbers of the inputs' size (1) is allowed besides.
BESIDES = 4 * torch.finfo(torch.float32).eps


def oracles(call: Call, dtype: torch.dtype):
    """(truth, plain torch in the call's dtype), each (results, gradients)."""
    return oracle(call, torch.float64), oracle(call, dtype)


@lru_cache(maxsize=1)
def oracles_of(make: Callable, dtype: torch.dtype):
    """Those of `make(dtype, CPU)`, made once for all backends."""
    return oracles(make(dtype, CPU), dtype)


def hold(
    call: Call, backend: str, dtype: torch.dtype, besides: float = 0.0, against: Any = None
) -> None:
    """Values and gradients of a call on a backend against the closeness rule.

    besides: what is allowed on top of the rule, of 1 and of the largest |truth|.
    against: the call's `oracles`, if they are known.
    """

    def close(name: str, o: Tensor, p: Tensor, t: Tensor, factor: float) -> None:
        assert o.shape == t.shape, f"{name}: shape {list(o.shape)}, not {list(t.shape)}"
        error, allowed = measured(o, p, t, factor)
        top = t[t.isfinite()].detach().abs().max() if t.isfinite().any() else 0.0
        allowed += besides * (1 + float(top))
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"

    call = replace(call, options={**call.options, "backend": backend})
    ours, our_gradients = differentiate(call)
    (truth, true_gradients), (plain, plain_gradients) = against or oracles(call, dtype)
    for i, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        p, t = p.to(o.device), t.to(o.device)  # naive computes some statistics on the host
        if o.is_floating_point():
            close(f"result {i}", o, p, t, VALUES)
        else:  # the likeliest id, in the rows in which plain torch finds it in this dtype
            assert torch.equal(o[p == t], t[p == t]), f"result {i}"
    for name, o, p, t in zip(
        leaves(call), our_gradients, plain_gradients, true_gradients, strict=True
    ):
        close(f"d{name}", o, p, t, GRADIENTS)


@pytest.mark.parametrize(("case", "backend", "dtype"), list(_served_dtypes()))
def test_values_and_gradients(case: str, backend: str, dtype: torch.dtype) -> None:
    hold(CASES[case](dtype, CPU), backend, dtype, against=oracles_of(CASES[case], dtype))


BEYOND_FINITE_DIFFERENCES = {
    "attention_map/kl_flat_heads": "with scores in the hundreds, a step of 1e-6 is a large one",
    "attention_map/map_visible_lse": "the given lse does not follow q and k",
    "linear_cross_entropy/certain_targets": "the gradients are far below the step's rounding",
    "linear_cross_entropy/common_logit": "a step is lost in the rounding of logits of 2^24",
}


@each_case
def test_gradcheck_of_the_reference(case: str) -> None:
    if case in BEYOND_FINITE_DIFFERENCES:
        pytest.skip(BEYOND_FINITE_DIFFERENCES[case])
    call = make(case, torch.float64, "reference")
    inputs = leaves(call, torch.float64)

    def function(*tensors: Tensor):
        results = call.run(**dict(zip(inputs, tensors, strict=True)))[: call.differentiable]
        return tuple(x.nan_to_num(neginf=0.0) for x in results)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


class _Recorder(TorchDispatchMode):
    """Records the arguments of every groundkern op that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "groundkern":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@each_tried
def test_opcheck(case: str, backend: str) -> None:
    call = make(case, torch.float32, backend)
    with _Recorder() as recorder:
        differentiate(call)
    backwards = sum("backward" in func.name() for func, _ in recorder.seen)
    plans = sum(func.name() == "groundkern::plan" for func, _ in recorder.seen)
    assert len(recorder.seen) == 1 + backwards + plans, "one forward op"
    assert plans <= 2 and not (plans and backend != "triton"), "the CPU backends need no plan"
    ahead = any("with_gradients" in func.name() for func, _ in recorder.seen)
    assert backwards == (0 if ahead else 1), (
        "one backward op, unless the forward computed the gradients"
    )
    for func, args in recorder.seen:
        forward = "backward" not in func.name()
        args = tuple(_leaf(x, forward) if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(func, args)


def _leaf(x: Tensor, trained: bool) -> Tensor:
    return x.detach().requires_grad_(trained and x.is_floating_point())


@each_tried
def test_compiled_equals_eager(case: str, backend: str) -> None:
    call = make(case, torch.float32, backend)
    eager, eager_gradients = differentiate(call)
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, dynamic=True, backend="aot_eager")
    results, gradients = differentiate(call, compiled)
    for a, b in zip((*eager, *eager_gradients), (*results, *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(c, b, marks=[pytest.mark.long] if b == "triton" and n % 2 else [])
        for n, (c, b) in enumerate(sorted(SERVED, key=lambda served: served[1]))
    ],  # in Triton's interpreter every other case
)
def test_same_bits_in_dirty_memory(case: str, backend: str) -> None:
    """New memory is filled with NaN, so that a read before the first write shows."""
    call = make(case, torch.float32, backend)
    first = _flat(differentiate(call))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            second = _flat(differentiate(call))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def _flat(pair: tuple) -> list[Tensor]:
    return [*pair[0], *pair[1]]


@each_tried
def test_autocast_computes_in_its_dtype_and_keeps_statistics_wide(case: str, backend: str) -> None:
    call = make(case, torch.float32, backend)
    operands = [n for n in call.inputs if n not in ("head_weight", "target", "lse")]
    narrow = replace(
        call, inputs={**call.inputs, **{n: call.inputs[n].bfloat16() for n in operands}}
    )
    expected = narrow.run()
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = differentiate(call)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert all(g.dtype == torch.float32 for g in gradients), (
        "gradients come in the parameter's dtype"
    )


@pytest.mark.parametrize("backend", [b for c, b in SERVED if c == "linear_cross_entropy/mean"])
def test_autocast_lets_bf16_states_meet_an_fp32_head(backend: str) -> None:
    call = make("linear_cross_entropy/mean", torch.float32, backend)
    mixed = {**call.inputs, "hidden": call.inputs["hidden"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert call.run(**mixed)[0].dtype == torch.float32
    with pytest.raises(TypeError, match=r"`weight`: expected torch\.bfloat16, got torch\.float32"):
        call.run(**mixed)
