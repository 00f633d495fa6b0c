"""The raw bindings of attention maps: what does not fit is an error before memory is touched."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")
test_bindings = importlib.import_module("tests.test_bindings")  # it needs _C itself
int32 = test_bindings.int32

N, B, HQ, HKV, S, D, DV, C = 5, 2, 4, 2, 70, 24, 8, 6
ATTENTION, CONTRIBUTION, KL_MEAN, KL_EACH = range(4)
KINDS = (ATTENTION, CONTRIBUTION, KL_MEAN, KL_EACH)


def view(x: Tensor | None) -> tuple | None:
    return None if x is None else test_bindings.view(x)


def tensors(
    kind: int, backward: bool = False, trained_lse: bool = False
) -> dict[str, Tensor | None]:
    """The tensors of a call; row 1 is a padding row and row 4 has no column of its own."""
    kl, contributes = kind in (KL_MEAN, KL_EACH), kind == CONTRIBUTION
    x = {
        "q": torch.randn(N, HQ, D),
        "k": torch.randn(B, HKV, S, D),
        "v": torch.randn(B, HKV, S, DV) if contributes else None,
        "g": torch.randn(N, HQ, DV) if contributes else None,
        "head_weight": None if contributes else torch.rand(N, HQ),
        "target": torch.rand(N, C) if kl else None,
        "sequence": int32(0, 0, 0, 1, 1),
        "start": int32(0, 7, 3, 64, 0),
        "stop": int32(70, 7, 66, 70, 1),
        "columns": int32([0, 3, 5, 64, 65, 69], [2, 66, -1, 67, 68, -1]),
        "bits": torch.full((2, 3), -1, dtype=torch.int32),
        "set_index": int32(0, 1, -1, 1, 0),
        "lse": torch.randn(N, HQ) if trained_lse else None,
    }
    result = torch.full((N,) if kl else (N, C), math.nan)
    if not backward:
        return {**x, "out": result}
    names = ("q", "k", "v", "g", "head_weight", *["lse"] * trained_lse)
    gradients = {f"d{i}": None if x[i] is None else torch.full_like(x[i], math.nan) for i in names}
    return {**x, "upstream": torch.randn(result.shape), "dlse": None, **gradients}


def call(kind: int, x: dict[str, Tensor | None], /, **replaced: object) -> None:
    function = _C.attention_map_backward if "upstream" in x else _C.attention_map_forward
    options = {"kind": kind, "over_columns": False, "rectify": False}
    options |= {"lse_grad": x["lse"] is not None, "scale": 0.5, "softcap": 0.0, "threads": 1}
    function(**{**{name: view(y) for name, y in x.items()}, **options, **replaced})


WRITTEN = ("out", "dq", "dk", "dv", "dg", "dhead_weight", "dlse")


def refused(kind: int, x: dict[str, Tensor | None], name: str, /, **replaced: object) -> None:
    with pytest.raises(ValueError, match=f"^`{name}`: expected .+, got .+"):
        call(kind, x, **replaced)
    assert all(x[i].isnan().all() for i in WRITTEN if x.get(i) is not None), "memory was written"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_is_checked(kind: int, backward: bool) -> None:
    x = tensors(kind, backward, trained_lse=True)
    for name, tensor in x.items():
        if tensor is None:
            continue
        address, code, sizes, strides = view(tensor)
        bad = [(0, code, sizes, strides), (address, 9, sizes, strides)]
        bad += [(address, code, sizes[1:], strides[1:]), (address, code, (*sizes, 1), strides)]
        bad += [(address, code, sizes, (*strides[:-1], 2))]
        if name not in ("q", "columns", "bits", "k", "v"):
            bad.append((address, code, (sizes[0] + 1, *sizes[1:]), strides))
        for value in bad:
            refused(kind, x, name, **{name: value})


@pytest.mark.parametrize(
    "columns",
    [
        [[0, 3, 5, 64, 65, 70], [-1] * 6],
        [[0, 3, 3, 64, 65, 69], [-1] * 6],
        [[0, 3, -1, 2, 65, 69], [-1] * 6],
        [[-2, 3, 4, 5, 65, 69], [-1] * 6],
    ],
)
def test_columns_ascend_within_the_keys(columns: list[list[int]]) -> None:
    refused(KL_MEAN, {**tensors(KL_MEAN), "columns": int32(*columns)}, "columns")


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (ATTENTION, "kind", {"kind": 4}),
        (ATTENTION, "kind", {"kind": -1}),
        (ATTENTION, "scale", {"scale": math.nan}),
        (ATTENTION, "softcap", {"softcap": -1.0}),
        (ATTENTION, "threads", {"threads": 0}),
        (ATTENTION, "head_weight", {"head_weight": None}),
        (ATTENTION, "set_index", {"set_index": None}),
        (ATTENTION, "v", {"kind": CONTRIBUTION}),
        (ATTENTION, "target", {"kind": KL_EACH}),
        (CONTRIBUTION, "v", {"g": None}),
        (CONTRIBUTION, "v", {"kind": ATTENTION}),
        (KL_MEAN, "target", {"target": None}),
        (KL_MEAN, "target", {"kind": ATTENTION}),
        (ATTENTION, "lse_grad", {"lse_grad": True}),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(kind: int, name: str, options: dict) -> None:
    refused(kind, tensors(kind), name, **options)


def test_a_trained_lse_and_its_gradient_go_together() -> None:
    x = tensors(ATTENTION, backward=True, trained_lse=True)
    refused(ATTENTION, x, "lse", over_columns=True)
    refused(ATTENTION, x, "dlse", lse_grad=False)
    refused(ATTENTION, {**x, "dlse": None}, "dlse")


@pytest.mark.parametrize("over_columns", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unseen_keys_are_never_read_and_everything_is_written(
    kind: int, over_columns: bool
) -> None:
    """NaN in keys that no row sees, and in rows without keys, reaches no result."""
    x, y = tensors(kind), tensors(kind, backward=True)
    for name in ("k", "v"):
        for z in (x, y):
            if z[name] is not None:
                z[name][1, :, 1:64] = math.nan  # of sequence 1, rows see key 0 and keys from 64
    for name in ("q", "g"):
        for z in (x, y):
            if z[name] is not None:
                z[name][1] = math.nan  # the padding row
    call(kind, x, over_columns=over_columns)
    assert (x["out"][1] == 0).all() and (x["out"][4] == 0).all() and x["out"].isfinite().all()
    call(kind, y, over_columns=over_columns)
    for name in ("q", "k", "v", "g", "head_weight"):
        if y[name] is not None:
            assert y[f"d{name}"].isfinite().all() and y[f"d{name}"].any()
    assert not y["dq"][[1, 4]].any() and not y["dk"][1, :, 1:64].any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Large enough for several threads; with one, the loop is serial."""
    rows, keys = 64, 700
    for kind in KINDS:
        x = tensors(kind, backward=True)
        sizes = {"q": (rows, HQ, 64), "k": (1, HKV, keys, 64), "head_weight": (rows, HQ)}
        sizes |= {"v": (1, HKV, keys, 64), "g": (rows, HQ, 64), "target": (rows, 300)}
        x |= {i: None if x[i] is None else torch.rand(y) for i, y in sizes.items()}
        x |= {"sequence": torch.zeros(rows).int(), "start": torch.zeros(rows).int()}
        x |= {"stop": torch.arange(keys - rows, keys).int(), "bits": None, "set_index": None}
        x |= {"columns": torch.arange(100, 400).int()[None]}
        x["upstream"] = torch.randn((rows,) if x["target"] is not None else (rows, 300))
        results = []
        for threads in (1, 2, 3, 3):
            names = ("q", "k", "v", "g", "head_weight")
            y = {f"d{i}": None if x[i] is None else torch.full_like(x[i], math.nan) for i in names}
            call(kind, x | y, threads=threads)
            results.append([z for z in y.values() if z is not None])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


small = st.integers(-2, 4)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    rows=st.lists(st.tuples(small, small, small, small), max_size=4),
    columns=st.lists(st.lists(small, min_size=3, max_size=3), min_size=2, max_size=2),
    threads=st.integers(-1, 3),
    over_columns=st.booleans(),
)
def test_any_numbers_are_served_or_refused(
    kind: int, rows: list, columns: list, threads: int, over_columns: bool
) -> None:
    """Valid numbers give finite results everywhere; all others are refused before any write."""
    sequences, keys, sets, n = 2, 3, 2, len(rows)
    numbers = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).T.contiguous()
    sizes = {"q": (n, 2, 4), "k": (sequences, 1, keys, 4), "v": (sequences, 1, keys, 4)}
    sizes |= {"g": (n, 2, 4), "head_weight": (n, 2), "target": (n, 3)}
    ascending = [[c for c in row if c != -1] for row in columns]
    legal = [row[0] for row in rows] == sorted(row[0] for row in rows) and threads >= 1
    legal = legal and all(
        0 <= b < sequences and 0 <= start <= stop <= keys and -1 <= index < sets
        for b, start, stop, index in rows
    )
    legal = legal and all(
        row == sorted(set(row)) and all(0 <= c < keys for c in row) for row in ascending
    )
    for backward in (False, True):
        x = tensors(kind, backward)
        x |= {name: None if x[name] is None else torch.rand(y) for name, y in sizes.items()}
        x |= dict(zip(("sequence", "start", "stop", "set_index"), numbers))
        x |= {"columns": int32(*columns), "bits": torch.full((sets, 1), 5, dtype=torch.int32)}
        written = {"out": "out"} if not backward else {i: i[1:] for i in WRITTEN[1:]}
        shape = (n,) if kind in (KL_MEAN, KL_EACH) else (n, 3)
        x["upstream" if backward else "out"] = torch.full(shape, 1.0 if backward else math.nan)
        for name, source in written.items():
            if backward and x[source] is not None:
                x[name] = torch.full_like(x[source], math.nan)
        if legal:
            call(kind, x, threads=threads, over_columns=over_columns)
            assert all(x[i].isfinite().all() for i in written if x[i] is not None)
            continue
        with pytest.raises(
            ValueError, match=r"^`(sequence|start|stop|set_index|columns|threads)`: expected"
        ):
            call(kind, x, threads=threads, over_columns=over_columns)
        assert all(x[i].isnan().all() for i in written if x[i] is not None)
