"""Every term of linear cross entropy on the CPU's kernels: with our own products and torch's, in
one chunk and in several, at sizes around a panel's 32 rows and a block's 128 vocabulary entries."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern import LabelBags, available_backends, linear_cross_entropy, linear_log_prob
from groundkern.ops.cases import Call
from groundkern.ops.linear_cross_entropy import cases
from groundkern.selection import SoftTargets
from tests.ops.test_contract import BESIDES, differentiate, hold

NATIVE = available_backends()["native"]
pytestmark = pytest.mark.skipif(NATIVE is not None, reason=NATIVE or "")

FP32, BF16 = torch.float32, torch.bfloat16
DIM = 11
KERNELS = "groundkern.ops.linear_cross_entropy.native_kernels"
TERMS = {"temperature": 0.7, "z_loss": 0.02, "label_smoothing": 0.2, "softcap": 2.5}


@pytest.fixture(params=[True, False], ids=["our_products", "products_of_torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the matrix products, all in fp32, are our own, whatever is faster on this CPU."""
    ours = request.param
    monkeypatch.setattr("groundkern.native.multiplies", lambda dtype: ours)
    monkeypatch.setattr(f"{KERNELS}._product_dtype", lambda dtype: FP32)
    return ours


def _inputs(rows: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(rows, DIM).to(dtype),
        "weight": torch.randn(vocabulary, DIM).to(dtype),
        "bias": torch.randn(vocabulary).to(dtype),
    }


def _target(rows: int, vocabulary: int) -> Tensor:
    """The last entry in row 0; every fifth row is ignored."""
    target = torch.randint(vocabulary, (rows,))
    target[0] = vocabulary - 1
    target[4::5] = -100
    return target


def _bags(rows: int, vocabulary: int) -> LabelBags:
    """Three: with copies, none, and the last entry twice."""
    ids = torch.randint(vocabulary, (9,))
    ids[7:] = vocabulary - 1
    index = torch.arange(rows) % 4 - 1
    return LabelBags(ids, torch.tensor([0, 5, 5, 9]), index)


def _soft(rows: int, vocabulary: int, entries: int = 4) -> SoftTargets:
    """Copies, padding, probabilities of 0, and an ignored row."""
    ids = torch.randint(vocabulary, (rows, entries))
    ids[torch.rand(rows, entries) < 0.2] = -100
    ids[3::7] = -100
    return SoftTargets(ids, torch.rand(rows, entries) * (torch.rand(rows, entries) < 0.8))


def _class_weight(vocabulary: int) -> Tensor:
    """0 for some."""
    weight = torch.rand(vocabulary) + 0.1
    weight[2::9] = 0.0
    return weight


def _every_term(rows: int, vocabulary: int, dtype: torch.dtype, soft: bool) -> Call:
    options = {
        **TERMS,
        "class_weight": _class_weight(vocabulary),
        "row_weight": torch.randn(rows),
        "reduction": "none",
        "entropy": True,
        "top_k": min(6, vocabulary),
    }
    if soft:
        options["target"] = _soft(rows, vocabulary)
    else:
        options["target"] = _target(rows, vocabulary)
        options |= {"bags": _bags(rows, vocabulary), "smoothing": 0.3}
    return Call(linear_cross_entropy, _inputs(rows, vocabulary, dtype), options)


def _with_entropy(rows: int, vocabulary: int, dtype: torch.dtype, softcap: float | None) -> Call:
    """log_prob, lse and entropy, each with a gradient from above."""
    options = {"target": _target(rows, vocabulary), "softcap": softcap, "temperature": 1.3}
    options["top_k"] = min(32, vocabulary)
    inputs = _inputs(rows, vocabulary, dtype)
    return Call(cases.log_prob_and_entropy, inputs, options, differentiable=3)


SIZES = [(1, 257), (33, 1), (33, 127), (40, 129), (65, 257)]
each_size = pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"),
    [*((*size, FP32) for size in SIZES), (40, 129, BF16)],
    ids=str,
)


@each_size
@pytest.mark.parametrize("soft", [False, True])
def test_every_term(rows: int, vocabulary: int, dtype, soft: bool, products: bool) -> None:
    hold(_every_term(rows, vocabulary, dtype, soft), "native", dtype, BESIDES)


@each_size
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_entropys_gradient(rows: int, vocabulary: int, dtype, softcap, products: bool) -> None:
    hold(_with_entropy(rows, vocabulary, dtype, softcap), "native", dtype, BESIDES)


@pytest.mark.parametrize("term", ["temperature", "z_loss", "label_smoothing"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_term_by_itself(term: str, weighted: bool, products: bool) -> None:
    c = _every_term(33, 129, FP32, soft=False)
    options = {"target": c.options["target"], term: TERMS[term], "reduction": "none"}
    if weighted:
        options["class_weight"] = c.options["class_weight"]
    hold(replace(c, options=options), "native", FP32, BESIDES)


def _same(call: Call, expected: tuple, bitwise: bool = False, **options) -> None:
    """Values and gradients, as `differentiate` returns them."""
    got = differentiate(call, backend="native", **options)
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        if bitwise:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


CALLS = {
    "bags": lambda: _every_term(40, 129, FP32, soft=False),
    "soft": lambda: _every_term(40, 129, FP32, soft=True),
    "soft mean": lambda: _mean(_every_term(40, 129, FP32, soft=True)),
    "entropy": lambda: _with_entropy(40, 129, FP32, None),
    "capped entropy": lambda: _with_entropy(40, 129, FP32, 2.0),
}
each_call = pytest.mark.parametrize("name", CALLS)


def _mean(call: Call) -> Call:
    return replace(call, options={**call.options, "reduction": "mean"})


@each_call
@pytest.mark.parametrize("rows", [1, 9])
def test_chunks_change_nothing(name: str, rows: int, products: bool, monkeypatch) -> None:
    """What fits one chunk is kept for the backward; what does not is computed again."""
    call = CALLS[name]()
    expected = differentiate(call, backend="native")
    monkeypatch.setattr(f"{KERNELS}.LOGIT_BYTES", rows * 129 * 4)
    _same(call, expected)


@each_call
@pytest.mark.parametrize("rows", [9, 1000])
def test_bf16_products_of_torch(name: str, rows: int, monkeypatch) -> None:
    """As on a CPU on which they are the fastest: scores are kept beside bf16 logits, whose rounding
    is all that tells the results from those of fp32 products."""
    monkeypatch.setattr(f"{KERNELS}.LOGIT_BYTES", rows * 129 * 6)
    call = CALLS[name]()
    call = replace(call, inputs={n: x.to(BF16) for n, x in call.inputs.items()})
    results = []
    for dtype in (BF16, FP32):
        monkeypatch.setattr("groundkern.native.multiplies", lambda dtype: False)
        monkeypatch.setattr(f"{KERNELS}._product_dtype", lambda _, dtype=dtype: dtype)
        results.append(differentiate(call, backend="native"))
    (got, gradients), (expected, wanted) = results
    for a, b in zip(got, expected, strict=True):
        assert not a.is_floating_point() or (a - b).abs().max() <= 0.02 * b.abs().max()
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@each_call
def test_the_same_bits(name: str, products: bool) -> None:
    """On a second run, with two threads, and in memory full of NaN."""
    call = CALLS[name]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = differentiate(call, backend="native")
        _same(call, expected, bitwise=True)
        torch.set_num_threads(2)
        _same(call, expected, bitwise=True)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
        _same(call, expected, bitwise=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_else_is_asked_for_changes_no_bit(softcap: float | None, products: bool) -> None:
    """Loss, log_prob and lse: with the entropy the scores are kept and not their exponentials."""
    call = _every_term(40, 129, FP32, soft=False)
    call = replace(call, options={**call.options, "softcap": softcap})
    inputs = {name: x.requires_grad_() for name, x in call.inputs.items()}
    every = linear_cross_entropy(**inputs, **call.options, backend="native")
    options = {**call.options, "entropy": False, "top_k": 0}
    for more in ({}, {"weight_grad": torch.zeros(129, DIM)}):
        few = linear_cross_entropy(**inputs, **options, **more, backend="native")
        with torch.no_grad():
            none = linear_cross_entropy(**inputs, **call.options, backend="native")
        for name in ("loss", "log_prob", "lse", "predicted"):
            assert torch.equal(getattr(every, name), getattr(few, name)), name
            assert torch.equal(getattr(every, name), getattr(none, name)), name


def test_a_soft_target_of_one_label_is_a_target(products: bool) -> None:
    inputs, target = _inputs(33, 129, FP32), _target(33, 129)
    hard = Call(linear_cross_entropy, inputs, {"target": target, **TERMS, "reduction": "none"})
    soft = SoftTargets(target[:, None], torch.ones(33, 1))
    _same(hard, differentiate(hard, backend="native", target=soft), bitwise=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_log_probability_of_soft_targets_may_be_of_any_label(backend: str) -> None:
    """The loss and its gradients stay; the label need not be listed."""
    inputs = _inputs(33, 129, FP32)
    soft, label = _soft(33, 129), torch.arange(33) * 3
    soft.ids[4] = -100
    options = {"reduction": "none", "backend": backend}
    plain = linear_cross_entropy(**inputs, target=soft, **options)
    found = linear_cross_entropy(**inputs, target=replace(soft, label=label), **options)
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-5, atol=1e-6)
    z = F.linear(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    wanted = z.log_softmax(1).gather(1, label[:, None])[:, 0]
    wanted[(soft.ids == -100).all(1)] = 0.0
    torch.testing.assert_close(found.log_prob, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`target`: expected labels in \[0, 129\)"):
        linear_cross_entropy(**inputs, target=replace(soft, label=label + 100), **options)
    with pytest.raises(ValueError, match=r"`target.label`: expected shape \[33\]"):
        replace(soft, label=label[:5])


def test_soft_targets_of_many_labels_are_the_cross_entropy_of_torch(products: bool) -> None:
    """Every entry of the vocabulary has a probability, in another order in each row."""
    inputs = _inputs(9, 130, FP32)
    order = torch.stack([torch.randperm(130) for _ in range(9)])
    p = torch.rand(9, 130).softmax(1)
    ours = Call(linear_cross_entropy, inputs, {"target": SoftTargets(order, p.gather(1, order))})

    def torchs(hidden, weight, bias, target):
        loss = F.cross_entropy(F.linear(hidden, weight, bias), p)
        return loss, *linear_cross_entropy(hidden, weight, target, bias=bias)[1:4]

    _same(ours, differentiate(ours, torchs))


@pytest.mark.parametrize("kept", [False, True])
def test_certain_targets(kept: bool, products: bool, monkeypatch) -> None:
    """p -> 1: 1 - p and the entropy are far below fp32's spacing at 1, as are their gradients."""
    if not kept:
        monkeypatch.setattr(f"{KERNELS}.LOGIT_BYTES", 1)
    weight = torch.eye(5, 8)
    hidden = torch.zeros(3, 8)
    hidden[:, 2] = torch.tensor([14.0, 22.0, 30.0])
    target = torch.full((3,), 2)
    for call in (
        Call(cases.log_prob_and_entropy, {"hidden": hidden, "weight": weight}, {"target": target}),
        Call(linear_log_prob, {"hidden": hidden, "weight": weight}, {"target": target}),
    ):
        call = replace(call, differentiable=3 if call.function != linear_log_prob else 2)
        got, (dhidden, dweight) = differentiate(call, backend="native")
        wide = {n: x.double() for n, x in call.inputs.items()}
        want, wanted = differentiate(replace(call, inputs=wide), backend="reference")
        for a, b in zip((*got, dhidden, dweight), (*want, *wanted), strict=True):
            # the reference's entropy in fp64 is a difference of numbers near 1e-13
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=1e-13)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_an_entry_of_probability_zero(softcap: float | None, products: bool) -> None:
    """A bias of -inf: it has no gradient, and adds nothing to the entropy."""
    inputs, target = _inputs(33, 140, FP32), _target(33, 140)
    inputs["bias"][130:] = -torch.inf  # the rest of a block
    inputs["bias"][5] = -torch.inf
    kept = inputs["bias"].isfinite()
    at = kept.cumsum(0) - 1
    target = torch.where(kept[target.clamp(min=0)], target, -100)
    options = {"target": target, "softcap": softcap, "top_k": 32}
    call = Call(cases.log_prob_and_entropy, inputs, options, differentiable=3)
    if softcap is not None:  # tanh maps -inf to -1
        inputs["bias"][~kept] = -1e30
        hold(call, "native", FP32, BESIDES)
        return
    few = {
        "hidden": inputs["hidden"],
        "weight": inputs["weight"][kept],
        "bias": inputs["bias"][kept],
    }
    there = torch.where(target >= 0, at[target.clamp(min=0)], -100)
    results, gradients = differentiate(call, backend="native")
    small = replace(call, inputs=few, options={**options, "target": there})
    expected, wanted = differentiate(small, backend="native")
    for i in (0, 1, 2, 5):
        torch.testing.assert_close(results[i], expected[i], rtol=1e-6, atol=1e-6)
    (dh, dw, db), (few_dh, few_dw, few_db) = gradients, wanted
    torch.testing.assert_close(dh, few_dh)
    torch.testing.assert_close(dw[kept], few_dw)
    torch.testing.assert_close(db[kept], few_db)
    assert not dw[~kept].any() and not db[~kept].any()


def test_a_label_of_probability_zero_costs_everything_or_nothing(products: bool) -> None:
    """Infinite where it weighs something, finite where its weight is 0."""
    inputs = _inputs(2, 9, FP32)
    inputs["bias"][4] = -torch.inf
    ids = torch.tensor([[1, 4], [1, 4]])
    soft = SoftTargets(ids, torch.tensor([[0.9, 0.1], [1.0, 0.0]]))
    options = {"reduction": "none", "backend": "native"}
    assert linear_cross_entropy(**inputs, target=soft, **options).loss.tolist()[0] == float("inf")
    got = linear_cross_entropy(**inputs, target=soft, **options)
    plain = linear_cross_entropy(**inputs, target=torch.tensor([1, 1]), **options)
    assert torch.equal(got.loss[1], plain.loss[1])


@pytest.mark.parametrize("vocabulary", [3, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_likeliest_of_equals_are_the_first(
    vocabulary: int, threads: int, products: bool
) -> None:
    """Integer logits, few of them different; beyond the vocabulary -1 and -inf."""
    hidden = torch.eye(4)[torch.arange(36) % 4]
    weight = torch.randint(3, (vocabulary, 4)).float()
    weight[:, 3] = 2.0  # all alike
    target = torch.zeros(36, dtype=torch.int64)
    target[7] = -100
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = linear_cross_entropy(hidden, weight, target, top_k=32, backend="native")
    finally:
        torch.set_num_threads(before)
    z = hidden @ weight.T
    values, ids = z.log_softmax(1).sort(dim=1, descending=True, stable=True)
    missing = (0, max(0, 32 - vocabulary))
    ids = F.pad(ids[:, :32], missing, value=-1)
    values = F.pad(values[:, :32], missing, value=-torch.inf)
    ids[7], values[7] = -1, 0.0
    assert torch.equal(got.top_ids, ids)
    assert torch.equal(got.predicted, got.top_ids[:, 0])
    torch.testing.assert_close(got.top_log_probs, values, rtol=1e-6, atol=1e-6)


def test_no_rows_and_only_ignored_ones(products: bool) -> None:
    for rows in (0, 5):
        inputs = {n: x.requires_grad_() for n, x in _inputs(rows, 129, FP32).items()}
        target = torch.full((rows,), -100)
        got = linear_log_prob(**inputs, target=target, entropy=True, top_k=3, backend="native")
        assert got.top_ids.shape == got.top_log_probs.shape == (rows, 3)
        assert not any(x.any() for x in (got.log_prob, got.lse, got.entropy, got.top_log_probs))
        assert (got.top_ids == -1).all() and (got.predicted == -1).all()
        gradients = torch.autograd.grad(got.entropy.sum() + got.lse.sum(), list(inputs.values()))
        assert not any(x.any() for x in gradients)
