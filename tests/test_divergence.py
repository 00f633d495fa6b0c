"""`attention_divergence` against stored maps in fp64: every kind, reference, block and edge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundkern import (
    AttentionReference,
    KeySets,
    QueryRows,
    attention_divergence,
    attention_map,
    available_backends,
    checks,
    set_logit_budget,
    side_attention,
)
from groundkern.ops.attention_map import cases
from groundkern.ops.cases import Call, coin, integers, randn
from tests.closeness import GRADIENTS, VALUES, assert_close
from tests.ops import naive

CPU = torch.device("cpu")
BACKENDS = [name for name, why in available_backends().items() if why is None]
WAYS = [
    ("kl", "visible"),
    ("kl", "columns"),
    ("kl", "renormalised"),
    ("reverse_kl", "columns"),
    ("reverse_kl", "renormalised"),
    ("js", "visible"),
    ("js", "columns"),
    ("js", "renormalised"),
]
BEYOND = ("reverse_kl", "renormalised", "triton")  # on these seeds torch is off by 0.6 eps
ONE_ROW = 1  # byte: a block of every row


@pytest.fixture
def blocks_of_one_row():
    set_logit_budget(ONE_ROW)
    yield
    set_logit_budget(None)


def naive_divergence(q, k, reference, rows, columns, *, kind, over, beta, floor=None, **given):
    """The equation, on stored maps; rows whose reference is empty are 0."""
    whole = "columns" if over == "columns" else "visible"
    allowed = given.get("allowed")
    even = {"over": "visible", "allowed": allowed}  # the same attention on every key
    own = naive.attention_map(q.double() * 0, k.double() * 0, rows, columns, **even) > 0
    least = 1e-6
    if isinstance(reference, AttentionReference):
        least = torch.finfo(torch.float32 if q.dtype != torch.float64 else q.dtype).tiny
        theirs = {name: getattr(reference, name) for name in ("head_weight", "scale", "softcap")}
        theirs |= {"over": whole, "allowed": allowed}
        reference = naive.attention_map(reference.q, reference.k, rows, columns, **theirs)
    m = naive.attention_map(q, k, rows, columns, over=whole, **given)
    p = torch.where(own, reference.to(m.dtype), 0.0)
    has = p.sum(1) > 0
    p = p / torch.where(has, p.sum(1), 1.0)[:, None]
    if over == "renormalised":
        m = m / torch.where(m.sum(1) > 0, m.sum(1), 1.0)[:, None]
    if kind == "reverse_kl":
        p = torch.where(own, p.clamp_min(least if floor is None else floor), 0.0)
        p = p / torch.where(has, p.sum(1), 1.0)[:, None]
        found = _sum(m, m, p)
    elif kind == "kl":
        found = _sum(p, p, m)
    else:
        between = beta * p + (1 - beta) * m
        off = torch.log(torch.tensor(1 / (1 - beta), dtype=m.dtype)) * (1 - m.sum(1))
        found = beta * _sum(p, p, between) + (1 - beta) * (_sum(m, m, between) + off)
    return torch.where(has, found, 0.0)


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[N]: sum weight log(a / b), over what has any."""
    some = weight > 0
    return (weight * (torch.where(some, a, 1.0).log() - torch.where(some, b, 1.0).log())).sum(1)


def make_call(kind: str, over: str, dtype=torch.float64, *, of_model=False, **options) -> Call:
    """A call with sets, ragged columns, padding rows, an empty target and weights of each row."""
    call = cases.call(attention_map, dtype, CPU, over="visible")
    rows, columns = call.options["rows"], call.options["columns"]
    allowed = coin(9, 3, cases.KEYS, device=CPU)
    allowed[:, 5] = True
    sets = KeySets.from_bool(allowed, integers([0, -1, 1, 1, 2, 0, 1, 0, 2, -1, 1, 0], CPU))
    inputs = {**call.inputs, "head_weight": randn(6, 12, 4, dtype=torch.float32, device=CPU).abs()}
    if dtype == torch.float64:
        inputs["head_weight"] = inputs["head_weight"].double()
    reference: Tensor | AttentionReference = cases.target(CPU)
    if of_model:  # one head for two, another size
        theirs = [randn(20, 12, 2, 8, dtype=dtype, device=CPU)]
        theirs.append(randn(21, 2, 1, cases.KEYS, 8, dtype=dtype, device=CPU))
        weight = randn(22, 2, dtype=inputs["head_weight"].dtype, device=CPU).abs()
        reference = AttentionReference(*theirs, weight, scale=0.7, softcap=3.0)
    given = {"kind": kind, "over": over, "beta": 0.3, "allowed": sets, "softcap": 2.0}
    given |= {"rows": rows, "columns": columns, "reference": reference, **options}
    return Call(attention_divergence, inputs, given)


def wide(call: Call) -> Call:
    """In fp64, of the same numbers."""

    def exact(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    options = {name: exact(x) for name, x in call.options.items()}
    if isinstance(options["reference"], AttentionReference):
        options["reference"] = AttentionReference(*map(exact, options["reference"]))
    return replace(call, inputs={n: exact(x) for n, x in call.inputs.items()}, options=options)


def run(call: Call, function=attention_divergence, **more) -> dict[str, Tensor]:
    """The rows and the gradients of an uneven sum of them."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in call.inputs.items()}
    rows = function(**leaves, **{**call.options, **more})
    upstream = randn(30, len(rows), dtype=torch.float64, device=CPU).to(rows.dtype)
    found = torch.autograd.grad((rows * upstream).sum(), list(leaves.values()))
    return {"rows": rows.detach(), **dict(zip(leaves, found, strict=True))}


def hold(call: Call, **more) -> None:
    """The one rule of closeness."""
    truth, plain = run(wide(call), naive_divergence), run(call, naive_divergence)
    for name, x in run(call, **more).items():
        assert_close(name, x, plain[name], truth[name], VALUES if name == "rows" else GRADIENTS)


@pytest.mark.parametrize("of_model", [False, True], ids=["tensor", "model"])
@pytest.mark.parametrize(("kind", "over"), WAYS)
def test_it_is_the_equation_whatever_the_blocks(kind, over, of_model, blocks_of_one_row) -> None:
    """In fp64, to the last digits, rows of several sequences."""
    call = make_call(kind, over, of_model=of_model)
    truth = run(call, naive_divergence)
    some = ONE_ROW if (kind, over) == ("js", "renormalised") else 8 * 8 * 10 * 5  # or 5 rows
    for budget in (some, None):
        set_logit_budget(budget)
        for name, x in run(call, backend="reference").items():
            torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "over"), WAYS)
def test_it_is_as_close_as_torch(kind, over, dtype) -> None:
    of_model = over == "renormalised"
    hold(make_call(kind, over, dtype, of_model=of_model))
    if kind == "js":
        hold(make_call(kind, over, torch.float16, of_model=not of_model))


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "over"), WAYS)
def test_every_backend(request, kind, over, backend) -> None:
    if (kind, over, backend) == BEYOND:
        why = "dhead_weight is off by 3 eps, 3 % beyond the rule; native by 2.6, reference by 2.4"
        request.applymarker(pytest.mark.xfail(strict=True, reason=why))
    for of_model in (False, True):
        call = make_call(kind, over, torch.float32, of_model=of_model)
        hold(call, backend=backend)


@pytest.mark.parametrize(("kind", "over"), [way for way in WAYS if way[1] != "columns"])
def test_in_log_space_it_is_the_same(kind, over, monkeypatch) -> None:
    """The way that is taken where values cannot be looked at, as on a GPU."""
    found = {}
    for of_model in (False, True):
        call = make_call(kind, over, of_model=of_model)
        call.inputs["head_weight"][:, 1] = 0.0  # the weight of a head may grow from 0
        found[of_model] = call, run(call, naive_divergence)
    monkeypatch.setattr(checks, "values_visible", lambda *_: False)
    for call, truth in found.values():
        for name, x in run(call).items():
            torch.testing.assert_close(x, truth[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(("kind", "over"), [way for way in WAYS if way[1] != "columns"])
def test_a_given_lse(kind, over, seen, monkeypatch) -> None:
    """Without gradient it is the softmax's own; with one, an input of its own."""
    call = make_call(kind, over)
    q, k, rows = call.inputs["q"], call.inputs["k"], call.options["rows"]
    lse = side_attention(q, k, k, rows, softcap=2.0).lse
    moved = replace(call, inputs={**call.inputs, "lse": lse + 0.1 * torch.randn_like(lse)})
    moved.inputs["lse"][0, 2] = torch.inf  # a head that is left out
    truths = run(call, naive_divergence), run(moved, naive_divergence)
    monkeypatch.setattr(checks, "values_visible", lambda *_: seen)
    given = replace(call, options={**call.options, "lse": lse})
    for of_call, truth in zip((given, moved), truths, strict=True):
        for name, x in run(of_call).items():
            torch.testing.assert_close(x, truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("of_model", [False, True], ids=["tensor", "model"])
def test_maps_below_the_least_number_of_their_dtype(kind, of_model) -> None:
    """A key off the columns takes all attention: their mass is exp(-200), their shares are not."""
    rows = QueryRows.causal(torch.zeros(3, dtype=torch.int32), torch.tensor([6, 4, 6]))
    columns = integers([[1, 2, 4, 5]], CPU)
    q, k = torch.randn(3, 2, 16), torch.randn(1, 1, 7, 16)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 0, 0] = 100.0
    reference = AttentionReference(q.flip(1) * 1.1, k) if of_model else torch.rand(3, 4)
    given = {"kind": kind, "over": "renormalised", "beta": 0.5}
    given |= {"rows": rows, "columns": columns, "reference": reference}
    call = Call(attention_divergence, {"q": q, "k": k}, given)
    mass = attention_map(q.double(), k.double(), rows, columns, over="visible").sum(1)
    assert bool((mass < 1e-45).all())
    truth = run(wide(call), naive_divergence)
    assert bool(truth["k"].any())
    for name, x in run(call).items():
        torch.testing.assert_close(x.double(), truth[name], rtol=1e-3, atol=2e-5)


def test_one_column_far_below_the_others_keeps_its_kl() -> None:
    """log M = -150 there: plain maps say -87."""
    rows = QueryRows.causal(torch.zeros(1, dtype=torch.int32), torch.tensor([2]))
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, -150.0, 0.0]).view(1, 1, 3, 1)
    target = torch.tensor([[0.5, 0.5]])
    kl = attention_divergence(
        q, k, target, rows, integers([[0, 1]], CPU), kind="kl", over="renormalised", scale=1.0
    )
    # Q = (1, exp(-150)): .5 log(.5 / 1) + .5 (log .5 + 150) = 75 - log 2
    assert kl.item() == pytest.approx(75 - 0.6931472, rel=1e-6)


def log_scores(*heads: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """q [1, H, S] and k [1, H, S, S] of one row whose head h attends to the keys by heads[h]."""
    p = torch.tensor(heads)
    return p.clamp_min(1e-30).log()[None], torch.eye(p.shape[1]).expand(1, len(p), -1, -1)


def of_one_row(heads, columns, reference, **options) -> float:
    q, k = log_scores(*heads)
    last = torch.tensor([k.shape[2] - 1])
    rows = QueryRows.causal(torch.zeros(1, dtype=torch.int32), last)
    reference = torch.tensor([reference])
    found = attention_divergence(
        q, k, reference, rows, integers([columns], CPU), scale=1.0, **options
    )
    return float(found)


def test_cases_by_hand() -> None:
    # p = (1, 0), q = (0, 1): M = (.5, .5), each half is log 2: JS = log 2
    assert of_one_row([(0.0, 1.0)], [0, 1], [1.0, 0.0]) == pytest.approx(0.693147, abs=1e-5)
    # p = (.5, .5), q = (1, 0): M = (.75, .25): .5 (.5 log(2/3) + .5 log 2) + .5 log(4/3)
    # = .5 x .143841 + .5 x .287682 = .215762
    assert of_one_row([(1.0, 0.0)], [0, 1], [0.5, 0.5]) == pytest.approx(0.215762, abs=1e-5)
    # target (.95, .05), model (.5, .5), reverse: .5 log(.5/.95) + .5 log(.5/.05)
    # = .5 x -.641854 + .5 x 2.302585 = .830366
    reverse = of_one_row([(0.5, 0.5)], [0, 1], [19.0, 1.0], kind="reverse_kl")
    assert reverse == pytest.approx(0.830366, abs=1e-5)
    # beta = .25, p = (1, 0), q = (0, 1): .25 log(1 / .25) + .75 log(1 / .75) = .562335
    assert of_one_row([(0.0, 1.0)], [0, 1], [1.0, 0.0], beta=0.25) == pytest.approx(0.562335)


@pytest.mark.parametrize(
    ("kind", "over", "by_hand"),
    [
        # Two heads, image tokens 0 and 1, one language token. Head A has .9 on the image, as
        # (.72, .18); head B .1, as (.02, .08). The target is (.5, .5).
        # columns: A (.8, .2), B (.2, .8), mean (.5, .5)
        ("kl", "columns", 0.0),
        # visible: mean (.37, .13): .5 log(.5/.37) + .5 log(.5/.13) = .150553 + .673537
        ("kl", "visible", 0.824090),
        # renormalised: (.74, .26): the same less log 2, since the mass is .5
        ("kl", "renormalised", 0.130943),
        ("js", "columns", 0.0),
        # visible: M = (.435, .315, .25 off): .5 (.5 log(.5/.435) + .5 log(.5/.315))
        # + .5 (.37 log(.37/.435) + .13 log(.13/.315) + .5 log 2)
        # = .5 (.069631 + .231018) + .5 (-.059884 - .115055 + .346574) = .150324 + .085818
        ("js", "visible", 0.236142),
        # renormalised: M = (.62, .38): .5 (.5 log(.5/.62) + .5 log(.5/.38))
        # + .5 (.74 log(.74/.62) + .26 log(.26/.38))
        # = .5 (-.107556 + .137218) + .5 (.130933 - .098667) = .014831 + .016133
        ("js", "renormalised", 0.030964),
    ],
)
def test_two_heads_by_hand(kind, over, by_hand) -> None:
    heads = [(0.72, 0.18, 0.1), (0.02, 0.08, 0.9)]
    found = of_one_row(heads, [0, 1], [0.5, 0.5], kind=kind, over=over)
    assert found == pytest.approx(by_hand, abs=2e-6)


def test_self_excluded_is_no_column() -> None:
    """RAL: head A has .9 on itself, B .1: the mean comes first, and B counts nine times as much."""
    heads = [(0.1, 0.0, 0.9), (0.0, 0.9, 0.1)]
    # mean of what precedes: (.05, .45), renormalised (.1, .9), and not (.5, .5)
    assert of_one_row(heads, [0, 1], [0.1, 0.9]) == pytest.approx(0.0, abs=1e-6)
    assert of_one_row(heads, [0, 1], [0.5, 0.5]) > 0.1


@pytest.mark.parametrize("over", ["columns", "renormalised"])
@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
def test_a_model_against_itself(kind, over) -> None:
    """0, and no gradient but rounding."""
    call = make_call(kind, over, torch.float32)
    q, k = call.inputs["q"], call.inputs["k"]
    weight = call.inputs["head_weight"] / call.inputs["head_weight"].sum(1, keepdim=True)
    reference = AttentionReference(q, k, weight, softcap=2.0)
    inputs = {"q": q, "k": k, "head_weight": weight}
    options = {**call.options, "reference": reference}
    found = run(replace(call, inputs=inputs, options=options))
    assert float(found["rows"].abs().max()) < 1e-6
    assert float(found["q"].abs().max()) < 1e-6
    assert float(found["k"].abs().max()) < 1e-6
    if (kind, over) == ("js", "renormalised"):  # about 1e-5 of a map 1 % away, with its digits
        near = replace(call, inputs={**inputs, "q": q * 1.01}, options=options)
        truth = run(wide(near), naive_divergence)["rows"]
        torch.testing.assert_close(run(near)["rows"].double(), truth, rtol=2e-2, atol=3e-9)
