"""Run-time choice of the instruction set: all that this CPU has compute the same results."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")
test_bindings = importlib.import_module("tests.test_bindings")  # these need _C themselves
test_head_bindings = importlib.import_module("tests.test_head_bindings")
test_map_bindings = importlib.import_module("tests.test_map_bindings")

ISAS = _C.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLE = "GROUNDKERN_CPU_ISA"
# They differ in the order of sums, and the best one of some CPUs rounds p and ds to bf16.
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


def cross_entropy(dtype: torch.dtype, own: bool, softcap: float) -> list[Tensor]:
    """With our own products only in fp32: not every instruction set has those of bf16."""
    x = test_head_bindings.with_buffers(test_head_bindings.problem(dtype), softcap, own)
    results = []
    for direction, names in test_head_bindings.WRITTEN.items():
        test_head_bindings.call(direction, x, softcap=softcap)
        results += [x[name] for name in names]
    return [x for x in (*results, x["dlogits"], x["dbias"]) if x is not None]


def every_term(dtype: torch.dtype, own: bool, scores: bool, softcap: float) -> list[Tensor]:
    """Of cross entropy. Without scores there is no gradient of the entropy."""
    x = test_head_bindings.with_everything(test_head_bindings.problem(dtype))
    if not scores:
        x["dentropy"] = None
    x = test_head_bindings.with_buffers(x, softcap, own, scores)
    options = {"softcap": softcap, **test_head_bindings.EVERYTHING}
    results = []
    for direction, names in test_head_bindings.WRITTEN.items():
        test_head_bindings.call(direction, x, **options)
        results += [x[name] for name in names]
    results += [x[name] for name in (*test_head_bindings.ASKED, "dlogits", "dbias")]
    return [x for x in results if x is not None]


CALLS = {
    f"{function.__name__}-{dtype}-{arguments}": (function, dtype, arguments)
    for function, dtypes, variants in (
        (side_attention, DTYPES, [(0.0,), (1.5,)]),
        (
            attention_map,
            DTYPES,
            [(k, o, c) for k in range(4) for o in (False, True) for c in (0.0, 1.5)],
        ),
        (cross_entropy, DTYPES[:1], [(o, c) for o in (False, True) for c in (0.0, 1.5)]),
        (cross_entropy, DTYPES[1:2], [(False, 0.0), (False, 1.5)]),
        (every_term, DTYPES[:1], [(True, True, 1.5), (False, True, 0.0), (True, False, 0.0)]),
        (every_term, DTYPES[1:2], [(False, True, 1.5), (False, False, 0.0)]),
    )
    for dtype in dtypes
    for arguments in variants
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_isas_agree_with_the_baseline(call: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, dtype, arguments = CALLS[call]
    monkeypatch.setenv(VARIABLE, ISAS[-1])
    expected = function(dtype, *arguments)
    monkeypatch.setenv(VARIABLE, isa)
    assert _C.cpu_isa() == isa
    for a, b in zip(function(dtype, *arguments), expected, strict=True):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        error = (a - b)[finite].abs().max()
        assert error <= TOLERANCE[dtype] * (1 + b[finite].abs().max()), f"{error:.1e}"


def test_the_best_isa_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        assert _C.cpu_isa() == ISAS[0]


@pytest.mark.parametrize("value", ["AVX2", "sse", "avx512 "])
def test_an_unknown_isa_is_one_clear_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    names = ", ".join(ISAS)
    message = f"^`{VARIABLE}`: expected one of {names}, got {value}$"
    with pytest.raises(ValueError, match=message):
        _C.cpu_isa()
    x = test_bindings.tensors()
    with pytest.raises(ValueError, match=message):
        _C.side_attention_forward(**test_bindings.arguments(x))
    assert x["out"].isnan().all()
