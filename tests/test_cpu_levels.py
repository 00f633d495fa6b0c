"""Run-time choice of the instruction set: every level this CPU has gives the same results."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")
test_bindings = importlib.import_module("tests.test_bindings")  # these need _C themselves
test_map_bindings = importlib.import_module("tests.test_map_bindings")

LEVELS = _C.cpu_levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLE = "GROUNDKERN_CPU_ISA"
# Levels differ in the order of sums, and the last in rounding p and ds to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def seeded(make) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return make()


def side_attention(dtype: torch.dtype, softcap: float) -> list[Tensor]:
    x = seeded(lambda: test_bindings.tensors(dtype))
    options = {"softcap": softcap}
    _C.side_attention_forward(**test_bindings.arguments(x, **options))
    out = x.pop("out")
    y = {f"d{name}": torch.full_like(x[name], math.nan) for name in "qkv"}
    upstream = {"dout": torch.randn(out.shape).to(dtype), "dlse": torch.randn(x["lse"].shape)}
    _C.side_attention_backward(**test_bindings.arguments(x | y | upstream, **options))
    return [out, x["lse"], *y.values()]


def attention_map(dtype: torch.dtype, kind: int, over_columns: bool, softcap: float):
    results = []
    for backward in (False, True):
        x = seeded(lambda b=backward: test_map_bindings.tensors(kind, b))
        for name in ("q", "k", "v", "g", "dq", "dk", "dv", "dg"):
            if x.get(name) is not None:
                x[name] = x[name].to(dtype)
        test_map_bindings.call(kind, x, over_columns=over_columns, softcap=softcap)
        results += [x[name] for name in test_map_bindings.WRITTEN if x.get(name) is not None]
    return results


def cross_entropy(dtype: torch.dtype, softcap: float) -> list[Tensor]:
    x = seeded(lambda: test_bindings.logit_tensors(dtype))
    _C.linear_cross_entropy(**test_bindings.logit_arguments(x, softcap=softcap))
    return [x[name] for name in ("loss", "log_prob", "lse", "predicted", "logits")]


CALLS = {
    f"{function.__name__}-{dtype}-{arguments}": (function, dtype, arguments)
    for function, dtypes, variants in (
        (side_attention, DTYPES, [(0.0,), (1.5,)]),
        (
            attention_map,
            DTYPES,
            [(k, o, c) for k in range(4) for o in (False, True) for c in (0.0, 1.5)],
        ),
        (cross_entropy, DTYPES[:2], [(0.0,), (1.5,)]),
    )
    for dtype in dtypes
    for arguments in variants
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_levels_agree_with_the_baseline(
    call: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, dtype, arguments = CALLS[call]
    monkeypatch.setenv(VARIABLE, LEVELS[-1])
    expected = function(dtype, *arguments)
    monkeypatch.setenv(VARIABLE, level)
    assert _C.cpu_level() == level
    for a, b in zip(function(dtype, *arguments), expected, strict=True):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        error = (a - b)[finite].abs().max()
        assert error <= TOLERANCE[dtype] * (1 + b[finite].abs().max()), f"{error:.1e}"


def test_the_best_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        assert _C.cpu_level() == LEVELS[0]


@pytest.mark.parametrize("value", ["AVX2", "sse", "avx512 "])
def test_an_unknown_level_is_one_clear_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    names = ", ".join(LEVELS)
    message = f"^`{VARIABLE}`: expected one of {names}, got {value}$"
    with pytest.raises(ValueError, match=message):
        _C.cpu_level()
    x = test_bindings.tensors()
    with pytest.raises(ValueError, match=message):
        _C.side_attention_forward(**test_bindings.arguments(x))
    assert x["out"].isnan().all()


PRODUCTS = ((False, False), (True, False), (False, True))


def product_operands(m: int, n: int, k: int, transposed_a: bool, transposed_b: bool):
    a = torch.randn((k, m) if transposed_a else (m, k))
    b = torch.randn((n, k) if transposed_b else (k, n))
    expected = (a.T if transposed_a else a).double() @ (b.T if transposed_b else b).double()
    return a, b, expected


def multiply(a: Tensor, b: Tensor, out: Tensor, /, **options) -> None:
    views = {name: test_bindings.view(x) for name, x in (("a", a), ("b", b), ("out", out))}
    options = {"transposed_a": False, "transposed_b": False, "add": False, "threads": 1} | options
    _C.matrix_product(**{**views, **options})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("transposed_a", "transposed_b"), PRODUCTS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (37, 65, 5), (600, 300, 513)]
)
def test_matrix_product(
    m: int, n: int, k: int, transposed_a: bool, transposed_b: bool, level: str, monkeypatch
) -> None:
    monkeypatch.setenv(VARIABLE, level)
    a, b, expected = product_operands(m, n, k, transposed_a, transposed_b)
    turned = {"transposed_a": transposed_a, "transposed_b": transposed_b}
    results = []
    for threads in (1, 3):
        out = torch.full((m, n), math.nan)
        multiply(a, b, out, **turned, threads=threads)
        results.append(out.clone())
        multiply(a, b, out, **turned, threads=threads, add=True)
        torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("transposed_a", "transposed_b"), PRODUCTS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 3, 2), (3, 2, 0), (1, 1, 1), (37, 65, 5), (33, 64, 256), (600, 1100, 513)]
)
def test_bfloat16_product(
    m: int, n: int, k: int, transposed_a: bool, transposed_b: bool, level: str, monkeypatch
) -> None:
    """Summed in fp32 and rounded once; added to, once more. A level without bf16 refuses."""
    monkeypatch.setenv(VARIABLE, level)
    operands = product_operands(m, n, k, transposed_a, transposed_b)[:2]
    a, b = (x.bfloat16() for x in operands)
    out = torch.full((m, n), math.nan, dtype=torch.bfloat16)
    turned = {"transposed_a": transposed_a, "transposed_b": transposed_b}
    if not _C.has_matrix_product(_C.bfloat16):
        with pytest.raises(ValueError, match=r"^`a`: expected .+, got .+"):
            multiply(a, b, out, **turned)
        return
    expected = (a.T if transposed_a else a).double() @ (b.T if transposed_b else b).double()
    results = []
    for threads in (1, 3):
        multiply(a, b, out, **turned, threads=threads)
        results.append(out.clone())
        multiply(a, b, out, **turned, threads=threads, add=True)
        twice = results[0].double() + expected
        torch.testing.assert_close(out.double(), twice, rtol=2**-8, atol=1e-4)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), expected, rtol=2**-8, atol=1e-4)


def test_matrix_product_of_strided_rows() -> None:
    a, b = torch.randn(5, 40)[:, 3:20], torch.randn(17, 30)[:, :11]
    out = torch.full((5, 11), math.nan)
    multiply(a, b, out)
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a", {"a": torch.zeros(3, 4, dtype=torch.float16)}),
        ("b", {"b": torch.zeros(4, 2, dtype=torch.bfloat16)}),
        ("a", {"a": torch.zeros(3)}),
        ("a", {"a": torch.zeros(4, 3).T}),
        ("b", {"b": torch.zeros(5, 2)}),
        ("b", {"transposed_b": True}),
        ("b", {"transposed_a": True}),
        ("out", {"out": torch.zeros(3, 3)}),
        ("out", {"out": torch.zeros(2, 3).T}),
        ("out", {"out": torch.zeros(3, 4)[:, :2]}),
        ("threads", {"threads": 0}),
        ("transposed_b", {"transposed_a": True, "transposed_b": True}),
    ],
)
def test_matrix_product_refuses_what_does_not_fit(name: str, options: dict) -> None:
    x = {"a": torch.zeros(3, 4), "b": torch.zeros(4, 2), "out": torch.zeros(3, 2)}
    tensors = {**x, **{n: y for n, y in options.items() if n in x}}
    rest = {n: y for n, y in options.items() if n not in x}
    with pytest.raises(ValueError, match=f"^`{name}`: expected .+, got .+"):
        multiply(*tensors.values(), **rest)


size = st.tuples(st.integers(-1, 5), st.integers(-1, 5))
stride = st.tuples(st.integers(-2, 70), st.integers(0, 2))


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(sizes=st.tuples(size, size, size), strides=st.tuples(stride, stride, stride))
def test_matrix_product_of_any_views(sizes: tuple, strides: tuple) -> None:
    """Within memory that is there: a right result or a refusal that touches nothing."""
    memory = torch.randn(2, 512)
    out = torch.full((512,), math.nan)
    addresses = (memory[0].data_ptr(), memory[1].data_ptr(), out.data_ptr())
    views = {
        name: (address, _C.float32, y, z)
        for name, address, y, z in zip(("a", "b", "out"), addresses, sizes, strides, strict=True)
    }
    options = {"transposed_a": False, "transposed_b": False, "add": False, "threads": 2}
    (m, k), (k_b, n), (m_c, n_c) = sizes
    legal = min(m, k, n) >= 0 and (k, m, n) == (k_b, m_c, n_c)
    for (rows, columns), (down, across) in zip(sizes, strides, strict=True):
        used = rows > 0 and columns > 0
        legal = legal and not (used and rows > 1 and down < 0)
        legal = legal and not (used and columns > 1 and across != 1)
    legal = legal and not (m > 1 and n > 0 and strides[2][0] != n)
    if not legal:
        with pytest.raises(ValueError, match=r"^`(a|b|out)`: expected"):
            _C.matrix_product(**views, **options)
        assert out.isnan().all()
        return
    _C.matrix_product(**views, **options)
    a, b = (memory[i].as_strided(sizes[i], [max(x, 0) for x in strides[i]]) for i in range(2))
    torch.testing.assert_close(out[: m * n].view(m, n), a @ b, rtol=1e-5, atol=1e-5)
    assert out[m * n :].isnan().all()
