"""The raw bindings: what does not fit is an error before memory is touched.

tests/ops/test_contract.py compares values with the specification; here the plain formula on
`as_strided` views is enough.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")

N, B, HQ, HKV, S, D, DV = 5, 2, 4, 2, 70, 24, 8
CODES = {
    torch.float32: _C.float32,
    torch.bfloat16: _C.bfloat16,
    torch.float16: _C.float16,
    torch.int32: _C.int32,
    torch.int64: _C.int64,
}
Arguments = dict[str, object]


def view(x: Tensor) -> tuple:
    return x.data_ptr(), CODES[x.dtype], tuple(x.shape), x.stride()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a forward call; row 1 is a padding row."""
    return {
        "q": torch.randn(N, HQ, D).to(dtype),
        "k": torch.randn(B, HKV, S, D).to(dtype),
        "v": torch.randn(B, HKV, S, DV).to(dtype),
        "sequence": int32(0, 0, 0, 1, 1),
        "start": int32(0, 7, 3, 64, 0),
        "stop": int32(70, 7, 66, 70, 1),
        "bits": torch.full((2, 3), -1, dtype=torch.int32),
        "set_index": int32(0, 1, -1, 1, 0),
        "out": torch.full((N, HQ, DV), math.nan, dtype=dtype),
        "lse": torch.full((N, HQ), math.nan),
    }


def arguments(x: dict[str, Tensor], **replaced: object) -> Arguments:
    views = {name: view(tensor) for name, tensor in x.items()}
    return {**views, "scale": 0.5, "softcap": 0.0, "threads": 1, **replaced}


def backward_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a backward call, after its forward."""
    x = tensors(dtype)
    _C.side_attention_forward(**arguments(x))
    gradients = {f"d{name}": torch.full_like(x[name], math.nan) for name in "qkv"}
    upstream = {"dout": torch.randn(N, HQ, DV).to(dtype), "dlse": torch.randn(N, HQ)}
    del x["out"]
    return {**x, **gradients, **upstream}


def dense(q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula with only the visible range of each row, at scale 1/2."""
    group = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(group, 1)[x["sequence"].long()] for y in (k, v))  # [N, Hq, S, .]
    j = torch.arange(k.shape[2])
    keys = (j >= x["start"][:, None]) & (j < x["stop"][:, None])
    s = 0.5 * torch.einsum("nhd,nhsd->nhs", q, k)
    s = s.masked_fill(~keys[:, None], -math.inf)
    return torch.einsum("nhs,nhsd->nhd", s.softmax(-1).nan_to_num(), v), s.logsumexp(-1)


def test_make_sanitize_tests_the_sanitized_extension() -> None:
    assert _C.sanitized == (os.environ.get("GROUNDKERN_SANITIZE") == "1")


ADDRESS, DTYPE, SIZES, STRIDES = range(4)


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("q", ADDRESS, 0),
        ("k", ADDRESS, 4099),
        ("q", DTYPE, -1),
        ("q", DTYPE, 3),
        ("q", DTYPE, 1),
        ("k", DTYPE, 1),
        ("lse", DTYPE, 1),
        ("sequence", DTYPE, 0),
        ("q", SIZES, (N, HQ)),
        ("q", SIZES, (-1, HQ, D)),
        ("q", SIZES, (N + 1, HQ, D)),
        ("q", SIZES, (N, 3, D)),
        ("q", SIZES, (N, HQ, D - 1)),
        ("q", SIZES, (2**40, HQ, D)),
        ("k", SIZES, (B, 0, S, D)),
        ("k", SIZES, (B, HKV, S - 1, D)),
        ("v", SIZES, (B, HKV, S, 0)),
        ("v", SIZES, (B, HKV, S, DV + 1)),
        ("out", SIZES, (N, HQ, D)),
        ("lse", SIZES, (N, HKV)),
        ("start", SIZES, (N - 1,)),
        ("bits", SIZES, (2, 2)),
        ("set_index", SIZES, (N - 1,)),
        ("q", STRIDES, (HQ * D, D, 2)),
        ("q", STRIDES, (HQ * D, -D, 1)),
        ("k", STRIDES, (2**60, S * D, D, 1)),
        ("v", STRIDES, (1, 1, 1)),
        ("out", STRIDES, (0, DV, 1)),
        ("lse", STRIDES, (HQ + 1, 1)),
        ("bits", STRIDES, (0, 1)),
        ("stop", STRIDES, (2,)),
    ],
)
def test_a_view_that_does_not_fit_is_refused(name: str, part: int, value: object) -> None:
    x = tensors()
    parts = list(view(x[name]))
    parts[part] = value
    with pytest.raises(ValueError, match=r"^`\w+( and \w+)?`: expected .+, got .+"):
        _C.side_attention_forward(**arguments(x, **{name: tuple(parts)}))
    assert x["out"].isnan().all()
    assert x["lse"].isnan().all()


@pytest.mark.parametrize(
    "replaced",
    [
        {"threads": 0},
        {"threads": -3},
        {"threads": 5000},
        {"scale": math.nan},
        {"scale": math.inf},
        {"softcap": -1.0},
        {"softcap": math.nan},
        {"bits": None},
        {"set_index": None},
    ],
)
def test_a_number_that_does_not_fit_is_refused(replaced: Arguments) -> None:
    x = tensors()
    (name,) = replaced
    named = "set_index" if replaced[name] is None else name
    with pytest.raises(ValueError, match=f"^`{named}`: expected"):
        _C.side_attention_forward(**arguments(x, **replaced))
    assert x["out"].isnan().all()


@pytest.mark.parametrize(
    "replaced",
    [
        {"q": 7},
        {"q": (1, 2)},
        {"q": ("a", 0, (1,), (1,))},
        {"q": (-8, 0, (1,), (1,))},
        {"q": (2**64, 0, (1,), (1,))},
        {"q": (8, 0.5, (1,), (1,))},
        {"q": (8, 0, (2**63,), (1,))},
        {"q": (8, 0, (1,), "1")},
        {"q": None},
        {"scale": "half"},
        {"threads": 1.5},
        {"threads": 2**32 + 1},
    ],
)
def test_an_argument_of_another_type_is_a_type_error(replaced: Arguments) -> None:
    x = tensors()
    ((name, value),) = replaced.items()
    got = f"^`{name}`: not convertible from {type(value).__name__}$"
    with pytest.raises(TypeError, match=got):
        _C.side_attention_forward(**arguments(x, **replaced))
    assert x["out"].isnan().all()


def test_arguments_are_taken_by_name_and_all_of_them() -> None:
    x = tensors()  # kept: an argument is an address
    given = arguments(x)
    with pytest.raises(TypeError, match=r"^`qq`: not an argument of this function$"):
        _C.side_attention_forward(**given, qq=1)
    del given["stop"]
    with pytest.raises(TypeError, match=r"^`stop`: missing$"):
        _C.side_attention_forward(**given)
    with pytest.raises(TypeError, match="keyword"):
        _C.side_attention_forward(given["q"])
    with pytest.raises(TypeError):
        _C.has_matrix_product("float32")


@pytest.mark.parametrize("name", ["dout", "dlse", "lse", "dq", "dk", "dv"])
def test_backward_refuses_what_does_not_fit(name: str) -> None:
    x = backward_tensors()
    address, code, sizes, strides = view(x[name])
    for bad in (
        (address, 1, sizes, strides),
        (address, code, (sizes[0] + 1, *sizes[1:]), strides),
        (address, code, sizes[1:], strides[1:]),
        (address, code, sizes, (*strides[:-1], 2)),
        (0, code, sizes, strides),
    ):
        with pytest.raises(ValueError, match=f"^`{name}`: expected"):
            _C.side_attention_backward(**arguments(x, **{name: bad}))
    assert all(x[f"d{letter}"].isnan().all() for letter in "qkv")


small = st.integers(-2, 4)
SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@SETTINGS
@given(rows=st.lists(st.tuples(small, small, small, small), max_size=5))
def test_rows_are_checked_one_by_one(rows: list[tuple[int, int, int, int]]) -> None:
    """Any numbers: if they are valid the result is right, else they are refused."""
    sequences, keys, sets = 2, 3, 2
    columns = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).T.contiguous()
    x = dict(zip(("sequence", "start", "stop", "set_index"), columns))
    n = len(rows)
    x |= {"q": torch.randn(n, 2, 4), "k": torch.randn(sequences, 1, keys, 4)}
    x |= {"v": torch.randn(sequences, 1, keys, 4), "bits": torch.full((sets, 1), -1).int()}
    x |= {"out": torch.full((n, 2, 4), math.nan), "lse": torch.full((n, 2), math.nan)}
    sorted_rows = [row[0] for row in rows] == sorted(row[0] for row in rows)
    legal = sorted_rows and all(
        0 <= b < sequences and 0 <= start <= stop <= keys and -1 <= index < sets
        for b, start, stop, index in rows
    )
    if not legal:
        with pytest.raises(
            ValueError, match=r"^`(sequence|start|stop|set_index)`: expected values"
        ):
            _C.side_attention_forward(**arguments(x))
        return
    _C.side_attention_forward(**arguments(x))
    out, lse = dense(x["q"], x["k"], x["v"], x)
    torch.testing.assert_close(x["out"], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x["lse"], lse, rtol=1e-5, atol=1e-5)


MEMORY = 4096
size, stride = st.integers(-1, 5), st.integers(-2, 130)


@SETTINGS
@given(
    q=st.tuples(st.tuples(size, size, size), st.tuples(stride, stride, st.integers(0, 2))),
    k=st.tuples(st.tuples(size, size, size), st.tuples(stride, stride, stride)),
)
def test_any_sizes_and_strides(q: tuple, k: tuple) -> None:
    """Within valid memory: a right result or an error, never a crash."""
    (q_sizes, q_strides), (k_sizes, k_strides) = q, k
    k_sizes, k_strides = (*k_sizes, q_sizes[2]), (*k_strides, 1)
    memory = torch.randn(2, MEMORY)
    n, heads, width = (max(x, 0) for x in q_sizes)
    x = {name: torch.zeros(n, dtype=torch.int32) for name in ("sequence", "start", "stop")}
    x["stop"] += max(k_sizes[2], 0)
    x |= {"out": torch.full((n, heads, width), math.nan), "lse": torch.full((n, heads), math.nan)}
    code = _C.float32
    given = {
        "q": (memory[0].data_ptr(), code, q_sizes, q_strides),
        "k": (memory[1].data_ptr(), code, k_sizes, k_strides),
        "v": (memory[1].data_ptr(), code, k_sizes, k_strides),
    }
    calls = {**{name: view(y) for name, y in x.items()}, **given, "bits": None, "set_index": None}
    legal = min(*q_sizes, *k_sizes) >= 0 and width >= 1 and k_sizes[1] >= 1
    legal = legal and heads % k_sizes[1] == 0 and (n == 0 or k_sizes[0] >= 1)
    for sizes, strides in ((q_sizes, q_strides), (k_sizes, k_strides)):
        used = [b for a, b in zip(sizes, strides) if a > 1 and 0 not in sizes]
        legal = legal and min(used, default=0) >= 0
        legal = legal and (0 in sizes or sizes[-1] == 1 or strides[-1] == 1)
    if not legal:
        with pytest.raises(ValueError, match=r"^`\w+( and \w+)?`: expected"):
            _C.side_attention_forward(**calls, scale=0.5, softcap=0.0, threads=1)
        return
    _C.side_attention_forward(**calls, scale=0.5, softcap=0.0, threads=1)
    if n and k_sizes[2]:
        strides = [[max(b, 0) for b in y] for y in (q_strides, k_strides)]
        q_, k_ = (
            memory[0].as_strided(q_sizes, strides[0]),
            memory[1].as_strided(k_sizes, strides[1]),
        )
        out, lse = dense(q_, k_, k_, x)
        torch.testing.assert_close(x["out"], out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x["lse"], lse, rtol=1e-5, atol=1e-5)
    else:
        assert (x["out"] == 0).all() and (x["lse"] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unseen_keys_are_never_read_and_everything_is_written(dtype: torch.dtype) -> None:
    """NaN in keys that no row sees, and in uninitialised results, reaches no result."""
    x = backward_tensors(dtype)
    x["bits"][1] = 0  # row 3 sees nothing: its set is empty
    for name in ("q", "dout", "dlse"):
        x[name][[1, 3]] = math.nan  # rows 1 and 3 have no key
    for name in "kv":
        x[name][1, :, 1:] = math.nan  # of sequence 1, row 4 sees key 0 and row 3 nothing
    out, lse = torch.full((N, HQ, DV), math.nan, dtype=dtype), torch.full((N, HQ), math.nan)
    inputs = ("q", "k", "v", "sequence", "start", "stop", "bits", "set_index")
    _C.side_attention_forward(**arguments({**{i: x[i] for i in inputs}, "out": out, "lse": lse}))
    assert (out[[1, 3]] == 0).all() and (lse[[1, 3]] == -math.inf).all()
    assert out.isfinite().all() and lse[[0, 2, 4]].isfinite().all()

    x["lse"] = lse
    _C.side_attention_backward(**arguments(x))
    assert all(x[name].isfinite().all() for name in ("dq", "dk", "dv"))
    assert (x["dq"][[1, 3]] == 0).all()
    for name in ("dk", "dv"):
        assert (x[name][1, :, 1:] == 0).all()
        assert (x[name][0] != 0).any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Large enough for several threads; with one, the loop is serial."""
    rows, keys, width = 96, 700, 64
    x = {"q": torch.randn(rows, 4, width), "k": torch.randn(1, 2, keys, width)}
    x |= {"v": torch.randn(1, 2, keys, width), "sequence": torch.zeros(rows, dtype=torch.int32)}
    x |= {"start": torch.zeros(rows, dtype=torch.int32)}
    x |= {"stop": torch.arange(keys - rows, keys, dtype=torch.int32)}
    upstream = {"dout": torch.randn(rows, 4, width), "dlse": torch.randn(rows, 4)}
    results = []
    for threads in (1, 2, 3, 3):
        out = {
            "out": torch.full((rows, 4, width), math.nan),
            "lse": torch.full((rows, 4), math.nan),
        }
        no_sets = {"bits": None, "set_index": None, "threads": threads}
        _C.side_attention_forward(**arguments({**x, **out}, **no_sets))
        gradients = {f"d{name}": torch.full_like(x[name], math.nan) for name in "qkv"}
        call = {**x, **upstream, **gradients, "lse": out["lse"]}
        _C.side_attention_backward(**arguments(call, **no_sets))
        results.append([*out.values(), *gradients.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert all(y.isfinite().all() for y in results[0])
