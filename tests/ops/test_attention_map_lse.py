"""A given log-sum-exp that takes a gradient: what it is worth, and what it means if not finite."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from groundkern import (
    KeySets,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    side_attention,
)
from groundkern.ops.attention_map import cases
from groundkern.ops.cases import Call, coin, randn
from tests.ops.test_contract import BACKENDS, BESIDES, CPU, differentiate, hold

KINDS = {
    "map": (attention_map, {}),
    "contribution": (attention_contribution, {}),
    "rectified": (attention_contribution, {"rectify": True}),
    "mean": (attention_kl, {"heads": "mean"}),
    "each": (attention_kl, {"heads": "each"}),
}
KERNELS = [b for b in BACKENDS if b != "reference"]
# The interpreter is slow: between them, these kinds run every kernel.
TRITON_KINDS = ("rectified", "mean", "each")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cpu_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
each_kind = pytest.mark.parametrize("kind", KINDS)
each_tried = pytest.mark.parametrize(
    ("kind", "backend"),
    [(k, b) for k in KINDS for b in BACKENDS if b != "triton" or k in TRITON_KINDS],
)


def _call(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> Call:
    """A softcap, key sets, rows without columns and, where there are any, weights of each row."""
    function, options = KINDS[kind]
    call = cases.call(function, dtype, CPU, over="visible", softcap=2.0, **options, **more)
    allowed = KeySets.from_bool(coin(9, 3, cases.KEYS, device=CPU), torch.arange(12).int() % 4 - 1)
    call = replace(call, options={**call.options, "allowed": allowed})
    if function is attention_contribution:
        return call
    weight = randn(6, *call.inputs["q"].shape[:2], dtype=torch.float32, device=CPU).abs()
    return replace(call, inputs={**call.inputs, "head_weight": weight})


def _own_lse(q, k, rows, softcap, backend) -> torch.Tensor:
    return side_attention(q, k, k, rows, softcap=softcap, backend=backend).lse


def _with_own_lse(call: Call) -> Call:
    """The same call, its normaliser from side attention."""

    @wraps(call.function)
    def run(q, k, *, rows, softcap, backend, **rest):
        lse = _own_lse(q, k, rows, softcap, backend)
        given = {"rows": rows, "softcap": softcap, "backend": backend, "lse": lse}
        return call.function(q=q, k=k, **given, **rest)

    return replace(call, function=run)


def _same(call: Call, other: Call, backend: str, **close: float) -> None:
    pair = [differentiate(x, dtype=x.inputs["q"].dtype, backend=backend) for x in (call, other)]
    for ours, theirs in zip(*pair, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **close)


@each_kind
def test_side_attentions_lse_gives_the_gradients_of_the_softmax(kind: str) -> None:
    call = _call(kind, torch.float64)
    _same(_with_own_lse(call), call, "reference", rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "backend", "dtype"),
    [
        (k, b, t)
        for k in TRITON_KINDS
        for b in KERNELS
        for t in (torch.float32, torch.bfloat16)
        if b != "triton" or (k, t) == ("mean", torch.float32)
    ],
)
def test_side_attentions_lse_in_fewer_bits(kind: str, backend: str, dtype: torch.dtype) -> None:
    hold(_with_own_lse(_call(kind, dtype)), backend, dtype)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(k, b) for k in KINDS for b in KERNELS if b != "triton" or k in ("rectified", "each")],
)
def test_a_normaliser_of_its_own_against_plain_torch(kind: str, backend: str) -> None:
    hold(cases.with_trained_lse(_call(kind, shape=(6, 2), dim=20)), backend, torch.float32, BESIDES)


@each_kind
def test_the_lse_of_two_shards_merges_into_the_whole(kind: str) -> None:
    call = _call(kind, torch.float64)
    rows = call.options["rows"]
    edge = torch.full_like(rows.stop, 20)  # keys before 20, and the others
    first = replace(
        rows, start=torch.minimum(rows.start, edge), stop=torch.minimum(rows.stop, edge)
    )
    last = replace(rows, start=torch.maximum(rows.start, edge), stop=torch.maximum(rows.stop, edge))

    @wraps(call.function)
    def merged(q, k, *, softcap, backend, **rest):
        shards = [_own_lse(q, k, of, softcap, backend) for of in (first, last)]
        some = (rows.start < rows.stop)[:, None]  # logaddexp has no gradient of -inf and -inf
        shards = [torch.where(some, lse, 0.0) for lse in shards]
        lse = torch.where(some, torch.logaddexp(*shards), -torch.inf)
        given = {"softcap": softcap, "backend": backend, "lse": lse}
        return call.function(q=q, k=k, **given, **rest)

    _same(replace(call, function=merged), call, "reference", rtol=1e-12, atol=1e-13)


@each_cpu_backend
def test_used_twice_it_takes_both_gradients(backend: str) -> None:
    call = cases.with_trained_lse(_call("map"))
    options = {**call.options, "backend": backend}
    lse = call.inputs["lse"].requires_grad_()
    kl = _call("mean").inputs["target"]

    def one(which: int) -> torch.Tensor:
        inputs = {**call.inputs, "lse": lse}
        if which == 0:
            return attention_map(**inputs, **options).sum()
        return attention_kl(**inputs, **options, target=kl).sum()

    separate = [torch.autograd.grad(one(i), lse)[0] for i in range(2)]
    assert all(x.any() for x in separate)
    (both,) = torch.autograd.grad(one(0) + one(1), lse)
    torch.testing.assert_close(both, separate[0] + separate[1])


@each_tried
def test_a_head_whose_lse_is_infinite_is_left_out(kind: str, backend: str) -> None:
    """As if it had weight 0, with no gradient at all; a row without any other head gives 0."""
    call = cases.with_trained_lse(_call(kind))
    lse = call.inputs["lse"].clone()
    lse[0, 1], lse[1, 2], lse[7, 0], lse[9] = -torch.inf, torch.inf, torch.inf, -torch.inf
    out = lse.isinf()
    assert call.options["rows"].stop[9] > 0, "a row with keys"
    inputs = {**call.inputs, "lse": lse}
    results, gradients = differentiate(replace(call, inputs=inputs), backend=backend)
    named = dict(zip([n for n in inputs if n != "target"], gradients, strict=True))
    assert all(x.isfinite().all() for x in (*results, *gradients))
    assert not results[0][9].any()
    for name in ("q", "g", "head_weight", "lse"):
        assert name not in named or not named[name][out].any(), name
        assert name not in named or named[name].any()
    finite = {**inputs, "lse": torch.where(out, 50.0, lse)}  # p = exp(-50) there
    weighted = "head_weight" in inputs
    if weighted:
        finite["head_weight"] = torch.where(out, 0.0, inputs["head_weight"])
    truth, expected = differentiate(replace(call, inputs=finite), backend="reference")
    rows = [n for n in range(12) if n != 9]  # there, all weights are 0
    torch.testing.assert_close(results[0][rows], truth[0][rows], rtol=1e-4, atol=1e-5)
    for name, theirs in zip(named, expected, strict=True):
        if name in ("q", "g", "lse"):
            torch.testing.assert_close(
                named[name][rows], theirs[rows], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
            )


@each_backend
def test_without_gradient_a_row_whose_lse_is_infinite_is_left_out_too(backend: str) -> None:
    call = _call("mean")
    of = call.inputs["q"], call.inputs["k"], call.options["rows"], 2.0, "reference"
    lse = _own_lse(*of)
    lse[0, 1], lse[9] = torch.inf, -torch.inf
    results, gradients = differentiate(call, backend=backend, lse=lse)
    truth, expected = differentiate(call, backend="reference", lse=lse)
    assert not results[0][9].any() and results[0].isfinite().all()
    for a, b in zip((*results, *gradients), (*truth, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not gradients[0][0, 1].any() and gradients[0][0, 0].any()


def test_over_columns_refuses_an_lse_that_requires_grad_and_ignores_another() -> None:
    call = cases.with_trained_lse(_call("map"))
    lse = call.inputs.pop("lse")
    wanted = (
        r"^`lse`: expected an lse without gradient with over='columns'.+, got one that requires"
    )
    for function in (attention_map, attention_kl, attention_contribution):
        kind = {attention_map: "map", attention_kl: "mean", attention_contribution: "rectified"}
        with pytest.raises(ValueError, match=wanted):
            _call(kind[function]).run(over="columns", lse=lse.clone().requires_grad_())
    ignored = call.run(over="columns", lse=lse)[0]
    assert torch.equal(ignored, call.run(over="columns")[0])
    with torch.no_grad():
        call.run(over="columns", lse=lse.clone().requires_grad_())


@each_cpu_backend
def test_compiled_with_the_pass_that_makes_it(backend: str) -> None:
    call = _with_own_lse(_call("mean"))
    eager = differentiate(call, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(differentiate(call, compiled, backend=backend), eager, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    call = _with_own_lse(_call("mean"))
    function = call.function

    @wraps(function)
    def run(q, k, **rest):
        return checkpoint(lambda *x: function(*x, **rest), q, k, use_reentrant=reentrant)

    options = {"backend": "reference"}
    weight = call.inputs.pop("head_weight")
    call = replace(call, options={**call.options, **options, "head_weight": weight})
    inputs = {n: x.clone().requires_grad_() for n, x in call.inputs.items() if n != "target"}
    fixed = {**call.options, "target": call.inputs["target"]}
    plain = torch.autograd.grad(function(**inputs, **fixed).sum(), list(inputs.values()))
    run(*inputs.values(), **fixed).sum().backward()
    for x, gradient in zip(inputs.values(), plain, strict=True):
        torch.testing.assert_close(x.grad, gradient)


@each_backend
@pytest.mark.parametrize("kind", ["map", "rectified", "mean"])
@pytest.mark.parametrize("empty", ["rows", "columns"])
def test_nothing_to_do_gives_gradients_of_0(kind: str, empty: str, backend: str) -> None:
    call = cases.with_trained_lse(_call(kind))
    inputs, options = dict(call.inputs), {**call.options, "backend": backend, "allowed": None}
    if empty == "rows":
        inputs = {n: x if n in ("k", "v") else x[:0] for n, x in inputs.items()}
        none = torch.zeros(0, dtype=torch.int32)
        options["rows"] = QueryRows(none, none, none, none)
    else:
        inputs = {n: x[:, :0] if n == "target" else x for n, x in inputs.items()}
        options["columns"] = torch.zeros(2, 0, dtype=torch.int32)
    results, gradients = differentiate(replace(call, inputs=inputs, options=options))
    assert not any(x.any() for x in (*results, *gradients))
    assert gradients[-1].shape == inputs["lse"].shape
