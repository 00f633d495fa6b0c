"""`attention_divergence` beside torch's tools, at its edges, and what it keeps and refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundkern import (
    AttentionReference,
    QueryRows,
    attention_divergence,
    attention_map,
    set_logit_budget,
)
from groundkern.losses import map_divergence
from groundkern.ops.cases import integers
from tests.test_divergence import ONE_ROW, WAYS, make_call, run, wide

ONCE = [("js", "renormalised"), ("kl", "renormalised"), ("reverse_kl", "columns")]


@pytest.fixture
def small_blocks():
    set_logit_budget(8 * 8 * 10 * 5)
    yield
    set_logit_budget(None)


def plain(n: int = 6, dtype=torch.float32, columns: int = 5) -> dict:
    """A call of one sequence that sees everything."""
    rows = QueryRows.causal(torch.zeros(n, dtype=torch.int32), torch.full((n,), 8))
    given = {"q": torch.randn(n, 4, 16).to(dtype), "k": torch.randn(1, 2, 9, 16).to(dtype)}
    given |= {"rows": rows, "columns": torch.arange(columns, dtype=torch.int32)[None]}
    return {**given, "reference": torch.rand(n, columns)}


def trained(given: dict) -> tuple[Tensor, ...]:
    """The rows, and the gradients of q and k."""
    leaves = [given[name].detach().clone().requires_grad_() for name in "qk"]
    rows = attention_divergence(*leaves, **{n: x for n, x in given.items() if n not in "qk"})
    upstream = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
    return rows.detach(), *torch.autograd.grad((rows * upstream).sum(), leaves)


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize(("kind", "over"), [way for way in WAYS if way[0] != "kl"])
def test_it_is_map_divergence(kind, over, of_model) -> None:
    """The equation of `losses`, by way of the maps; with its floor."""
    given = plain(dtype=torch.float64)
    model = AttentionReference(given["q"].flip(2) * 2, given["k"].flip(2), scale=0.4)
    given["reference"][:, 2] = 0.0
    whole = {"over": "columns" if over == "columns" else "visible"}
    p = given["reference"]
    if of_model:
        where = given["rows"], given["columns"]
        p = attention_map(model.q, model.k, *where, scale=0.4, **whole)
    m = attention_map(*(given[name] for name in ("q", "k", "rows", "columns")), **whole)
    how = {"kind": kind, "beta": 0.2, "floor": 0.01}
    wanted = map_divergence(p, m, renormalise=over == "renormalised", **how)
    found = attention_divergence(
        **{**given, "reference": model if of_model else p}, over=over, **how
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("of_model", [False, True], ids=["tensor", "model"])
@pytest.mark.parametrize(("kind", "over"), [*ONCE, ("js", "visible")])
def test_no_map_is_kept(kind, over, of_model) -> None:
    """What autograd holds is what it was given."""
    call = make_call(kind, over, torch.float32, of_model=of_model)
    leaves = {n: x.clone().requires_grad_() for n, x in call.inputs.items()}
    reference = call.options["reference"]
    known = [*leaves.values(), *(reference if of_model else [reference])]
    storages = {x.untyped_storage().data_ptr() for x in known if isinstance(x, Tensor)}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in storages:
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rows = attention_divergence(**leaves, **call.options)
    assert kept == []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention_map(leaves["q"], leaves["k"], *(call.options[n] for n in ("rows", "columns")),
                      over="visible").square().sum()  # fmt: skip
    assert kept, "the count sees a map"
    rows.sum().backward()


@pytest.mark.parametrize("of_model", [False, True], ids=["tensor", "model"])
@pytest.mark.parametrize(("kind", "over"), ONCE)
def test_same_bits_in_memory_full_of_nan(kind, over, of_model, small_blocks) -> None:
    call = make_call(kind, over, torch.float32, of_model=of_model)
    first = run(call)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        again = run(call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(x.isfinite().all()) for x in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("kind", "over"), WAYS)
def test_rows_without_a_target_have_no_gradient(kind, over) -> None:
    """A padding row, a row whose target is empty, one whose target is off its own columns; their
    upstream gradient may be anything."""
    given = plain()
    stop = given["rows"].stop.clone()
    stop[1] = 0  # padding
    stop[3] = 2  # sees columns 0 and 1
    given["rows"] = replace(given["rows"], stop=stop)
    given["reference"][2] = 0.0
    given["reference"][3, :2] = 0.0
    q, k = (given.pop(name).requires_grad_() for name in "qk")
    for reference in (given["reference"], AttentionReference(q * 2, k)):
        rows = attention_divergence(q, k, **{**given, "reference": reference}, kind=kind, over=over)
        nothing = [1, 2, 3] if isinstance(reference, Tensor) else [1]
        assert rows[nothing].tolist() == [0.0] * len(nothing)
        others = [n for n in range(6) if n not in nothing]
        assert bool((rows[others] > 0).all())
        upstream = torch.ones(6)
        upstream[nothing] = torch.inf
        dq, dk = torch.autograd.grad(rows, (q, k), upstream)
        assert not dq[nothing].any()
        assert bool(dq[others].any()) and bool(dk.isfinite().all())


@pytest.mark.parametrize(("kind", "over"), ONCE)
def test_no_rows_and_no_columns(kind, over) -> None:
    for given in (plain(n=0), plain(columns=0)):
        rows, dq, dk = trained({**given, "kind": kind, "over": over})
        assert rows.tolist() == [0.0] * len(given["q"])
        assert dq.shape == given["q"].shape and not dq.any()
        assert dk.shape == given["k"].shape and not dk.any()


@pytest.mark.parametrize(("kind", "over"), ONCE)
def test_many_blocks_lose_no_digits_of_the_keys_gradient(kind, over) -> None:
    """bf16, 300 blocks of one row: a sum in bf16 would stand still at 256 like terms."""
    given = {**plain(300, torch.bfloat16), "kind": kind, "over": over}
    once = trained(given)[2].double()
    set_logit_budget(ONE_ROW)
    try:
        blocks = trained(given)[2].double()
    finally:
        set_logit_budget(None)
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
             for n, x in given.items()}  # fmt: skip
    truth = trained(exact)[2]
    size, allowed = truth.abs().max(), torch.finfo(torch.bfloat16).eps
    assert float((once - truth).abs().max() / size) < allowed
    assert float((blocks - truth).abs().max() / size) < allowed


def test_strides_do_not_matter() -> None:
    given = plain()
    wanted = trained(given)
    given["q"] = given["q"].transpose(0, 1).contiguous().transpose(0, 1)
    given["k"] = torch.stack((given["k"], given["k"]), -1)[..., 0]
    given["reference"] = given["reference"].t().contiguous().t()
    for x, y in zip(trained(given), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_autocast_casts_the_operands() -> None:
    given = plain()
    model = AttentionReference(given["q"] * 2, given["k"])
    given["reference"] = model
    with torch.autocast("cpu", torch.bfloat16):
        rows, dq, dk = trained(given)
    assert rows.dtype == dq.dtype == dk.dtype == torch.float32
    q, k = (given[name].bfloat16() for name in "qk")
    low = {**given, "q": q, "k": k, "reference": AttentionReference(model.q.bfloat16(), k)}
    assert torch.equal(rows, trained(low)[0])


@pytest.mark.parametrize(("kind", "over"), ONCE)
def test_checkpointing_and_compile(kind, over) -> None:
    given = {**plain(), "kind": kind, "over": over}
    q, k = (given.pop(name).requires_grad_() for name in "qk")

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return (attention_divergence(q * 1.5, k, **given) * 2).sum()

    wanted = torch.autograd.grad(loss(q, k), (q, k))
    for function in (
        lambda *x: checkpoint(loss, *x, use_reentrant=False),
        torch.compile(loss, backend="aot_eager"),
    ):
        found = torch.autograd.grad(function(q, k), (q, k))
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_frozen_inputs() -> None:
    """Gradients of what asks for them alone."""
    given = plain()
    q, k = given.pop("q"), given.pop("k")
    weight = torch.rand(4, requires_grad=True)
    rows = attention_divergence(q, k, **given, head_weight=weight)
    assert bool(torch.autograd.grad(rows.sum(), weight)[0].any())
    keys = k.clone().requires_grad_()
    assert bool(torch.autograd.grad(attention_divergence(q, keys, **given).sum(), keys)[0].any())
    assert not attention_divergence(q, k, **given).requires_grad
    with torch.no_grad():
        assert not attention_divergence(q, keys, **given).requires_grad


def test_no_gradient_reaches_the_reference() -> None:
    given = plain()
    q = given.pop("q").requires_grad_()
    k, target = given.pop("k"), given.pop("reference").requires_grad_()
    for reference in (target, AttentionReference(q * 2, k.clone().requires_grad_())):
        rows = attention_divergence(q, k, reference, **given)
        alone = attention_divergence(q, k, _frozen(reference), **given)
        wanted = torch.autograd.grad(alone.sum(), q)[0]
        found = torch.autograd.grad(rows.sum(), [q, target], allow_unused=True)
        assert torch.equal(found[0], wanted)
        assert found[1] is None


def _frozen(reference: Tensor | AttentionReference) -> Tensor | AttentionReference:
    if isinstance(reference, Tensor):
        return reference.detach()
    return AttentionReference(reference.q.detach(), reference.k.detach())


def test_nan_is_not_left_out() -> None:
    given = plain()
    given["q"][1, 0, 0] = torch.nan
    rows, dq, dk = trained(given)
    assert bool(rows[1].isnan()) and bool(rows[[0, 2]].isfinite().all())
    assert bool(dq[1, 0].isnan().any()) and bool(dk.isnan().any())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "hellinger"}, "`kind`: expected 'kl', 'reverse_kl' or 'js'"),
        ({"over": "rows"}, "`over`: expected 'visible', 'columns' or 'renormalised'"),
        ({"kind": "reverse_kl", "over": "visible"}, "`over`: expected 'columns' or"),
        ({"beta": 1.0}, r"`beta`: expected a number in \(0, 1\)"),
        ({"floor": 0.0}, r"`floor`: expected a number in \(0, 1\) or None"),
        ({"reference": torch.rand(6, 4)}, "`reference`: expected shape"),
        ({"reference": -torch.rand(6, 5)}, "`reference`: expected finite values >= 0"),
        ({"reference": torch.full((6, 5), torch.nan)}, "`reference`: expected finite values"),
        (
            {"reference": AttentionReference(torch.rand(5, 4, 16), torch.rand(1, 2, 9, 16))},
            "`reference.q`: expected shape",
        ),
        (
            {"reference": AttentionReference(torch.rand(6, 4, 16), torch.rand(1, 2, 8, 16))},
            "`reference.k`: expected shape",
        ),
        (
            {"over": "columns", "lse": torch.zeros(6, 4, requires_grad=True)},
            "`lse`: expected an lse without gradient",
        ),
        ({"columns": integers([[0, 1, 2, 3, 9]], torch.device("cpu"))}, "`columns`: expected"),
    ],
)
def test_what_is_refused(wrong, said) -> None:
    with pytest.raises(ValueError, match=said):
        attention_divergence(**{**plain(), **wrong})


def test_a_second_derivative_and_changed_rows_are_refused() -> None:
    given = plain()
    q = given.pop("q").requires_grad_()
    rows = attention_divergence(q, **given)
    (dq,) = torch.autograd.grad(rows.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative"):
        dq.sum().backward()
    rows = attention_divergence(q, **given)
    given["columns"][0, 0] = 1
    with pytest.raises(RuntimeError, match="`rows`: expected rows, key sets and columns"):
        rows.sum().backward()


def test_fp64_is_kept() -> None:
    call = wide(make_call("js", "renormalised", torch.float32))
    assert run(call)["rows"].dtype == torch.float64
