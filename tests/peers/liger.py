"""Liger-Kernel 0.8.2, test/transformers/test_fused_linear_cross_entropy.py: 141 cases."""

import torch
import torch.nn.functional as F

from groundkern.compat import liger
from tests.peers import truth
from tests.peers.case import FLOATS, Values, assert_allclose, gradients, grid, leaves

SUITE = "Liger fused linear cross entropy"
SHAPES = {"B T H V": [(8, 128, 1024, 4096), (4, 47, 31, 123)]}
TINY = {"B T H V": [(2, 2, 8, 8), (9, 7, 41, 41)]}
TOLERANCES = "reduction dtype atol rtol"
MEAN = [("mean", "bf16", 5e-3, 5e-2), ("mean", "fp32", 1e-5, 5e-4)]
SUM = [("sum", "bf16", 5e-0, 5e1), ("sum", "fp32", 1e-3, 5e-2)]
BOTH = [True, False]
OPTIONS = "class_weights label_smoothing ignore_index lse_square_scale softcap z_loss accum_dtype"
PLAIN, EVERYTHING = (
    (False, 0, -100, 0, None, False, None),
    (True, 0.1, 42, 1e-4, 30.0, True, "fp32"),
)


def small(values: Values) -> Values:
    """The large shape with a sixteenth of its rows, hidden size and vocabulary."""
    if values["H"] < 1024:
        return values
    return {**values, "B": 2, "T": 32, "H": 64, "V": 256}


def _draw(v: Values, low: str = "rand"):
    """x [N, D], weight [V, D], bias [V], target [N]. Weights are uniform in [0, 1), so logits are
    large: at D = 1024 of a standard deviation of 18."""
    dtype, draw = FLOATS[v["dtype"]], getattr(torch, low)
    weight = draw(v["V"], v["H"], dtype=dtype)
    bias = draw(v["V"], dtype=dtype) if v["bias"] else None
    x = torch.randn(v["B"] * v["T"], v["H"], dtype=dtype)
    return x, weight, bias, torch.randint(0, v["V"], (len(x),))


def _accumulates(v: Values) -> torch.dtype | None:
    return FLOATS.get(v.get("accum_dtype"))


def _loss(result):
    return result.loss if isinstance(result, liger.CrossEntropyOutput) else result


def check_module(v: Values) -> None:
    x, weight, bias, target = _draw(v)
    target = truth.some_ignored(target, v["ignore_index"])
    class_weight = torch.rand(v["V"]) if v["class_weights"] else None
    options = {
        "ignore_index": v["ignore_index"],
        "lse_square_scale": v["lse_square_scale"],
        "label_smoothing": v["label_smoothing"],
        "reduction": v["reduction"],
    }
    ours, theirs = leaves(x, weight, bias), leaves(x, weight, bias)
    module = liger.LigerFusedLinearCrossEntropyLoss(
        class_weight,
        softcap=v["softcap"],
        return_z_loss=v["z_loss"],
        accum_dtype=_accumulates(v),
        **options,
    )
    with torch.set_grad_enabled(v["grad"]):
        result = module(ours[1], ours[0], target, ours[2])
        z = truth.logits(*theirs, v["softcap"])
        expected, expected_z = truth.with_z_loss(z, target, class_weight, **options)
    tolerance = v["atol"], v["rtol"]
    assert_allclose("loss", _loss(result), expected, *tolerance)
    if v["z_loss"]:
        assert_allclose("z loss", result.z_loss, expected_z, *tolerance)
    if not v["grad"]:
        assert not _loss(result).requires_grad
        return
    pairs = zip(gradients(_loss(result), *ours), gradients(expected, *theirs))
    for name, (a, b) in zip(("dx", "dweight", "dbias"), pairs):
        assert_allclose(name, a, b, *tolerance)


def check_functional(v: Values) -> None:
    """The function, its arguments by name, against the module; the head is frozen."""
    x, weight, bias, target = _draw(v, "randn")
    options = {
        "ce_weight": torch.randn(v["V"]) if v["class_weights"] else None,
        "lse_square_scale": 1e-4,
        "label_smoothing": 0.1,
        "softcap": 30.0,
        "return_z_loss": True,
        "accum_dtype": torch.float32,
    }
    (a,), (b,) = leaves(x), leaves(x)
    function = liger.liger_fused_linear_cross_entropy
    one = function(input=a, weight=weight, target=target, bias=bias, **options)
    other = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, b, target, bias)
    z = truth.logits(x, weight, bias, 30.0)
    shared = {"lse_square_scale": 1e-4, "label_smoothing": 0.1}
    expected = truth.with_z_loss(z, target, options["ce_weight"], **shared)
    tolerance, upstream = (v["atol"], v["rtol"]), torch.randn(())
    for name, *results in zip(("loss", "z loss"), one, other, expected):
        assert_allclose(name, results[0], results[1], *tolerance)
        assert_allclose(f"{name} and torch", results[0], results[2], *tolerance)
    pair = gradients(one.loss, a, upstream=upstream), gradients(other.loss, b, upstream=upstream)
    assert_allclose("dx", pair[0][0], pair[1][0], *tolerance)


def check_token_accuracy(v: Values) -> None:
    x, weight, bias, target = _draw(v)
    target = truth.some_ignored(target, -100)
    ours, theirs = leaves(x, weight, bias), leaves(x, weight, bias)
    result = liger.liger_fused_linear_cross_entropy(
        ours[0], ours[1], target, ours[2], return_token_accuracy=v["return_token_accuracy"]
    )
    assert isinstance(result, liger.CrossEntropyOutput) == v["return_token_accuracy"]
    z = truth.logits(*theirs, None)
    tolerance = v["atol"], v["rtol"]
    if v["return_token_accuracy"]:
        right, counted = z.argmax(-1) == target, target != -100
        expected = (right & counted).sum().float() / counted.sum()
        assert_allclose("accuracy", result.token_accuracy, expected, *tolerance)
    loss = truth.with_z_loss(z, target)[0]
    assert_allclose("loss", _loss(result), loss, *tolerance)
    for a, b in zip(gradients(_loss(result), *ours), gradients(loss, *theirs)):
        assert_allclose("gradient", a, b, *tolerance)


def check_autocast(v: Values) -> None:
    """fp32 parameters, both passes under autocast. The bias is that of `torch.nn.Linear`."""
    x, weight, _, target = _draw({**v, "dtype": "fp32", "bias": False})
    bias = torch.nn.Linear(v["H"], v["V"]).bias if v["bias"] else None
    ours, theirs = leaves(x, weight, bias), leaves(x, weight, bias)
    module = liger.LigerFusedLinearCrossEntropyLoss(accum_dtype=_accumulates(v))
    with torch.autocast("cpu", FLOATS[v["cast_dtype"]]):
        loss = module(ours[1], ours[0], target, ours[2])
        expected = truth.with_z_loss(truth.logits(*theirs, None), target)[0]
        pairs = zip(gradients(loss, *ours), gradients(expected, *theirs))
    assert_allclose("loss", loss, expected, v["atol"], v["rtol"])
    for a, b in pairs:
        assert_allclose("gradient", a, b, v["atol"], v["rtol"])


def check_token_scaling(v: Values) -> None:
    x, weight, bias, target = _draw({"B": 2, "T": 4, **v, "dtype": "fp32", "bias": True}, "randn")
    if v["ignored"]:
        x, target = x[:6], torch.tensor([0, 100, -100, 500, -100, 999])
    (a,), (b,) = leaves(x), leaves(x)
    options = {"reduction": v["reduction"], "use_token_scaling": True}
    if v["module"]:
        loss = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, a, target, bias)
    else:
        loss = liger.liger_fused_linear_cross_entropy(a, weight, target, bias, **options)
    z = F.linear(b, weight, bias)
    rows = F.cross_entropy(z, target, reduction="none")
    at = target.clamp(min=0)[:, None]
    expected = rows * z.detach().softmax(-1).gather(1, at)[:, 0]
    expected = expected if v["reduction"] == "none" else expected.sum()
    assert loss.isfinite().all()
    assert_allclose("loss", loss, expected, v["atol"], v["atol"])
    pair = gradients(loss.sum(), a), gradients(expected.sum(), b)
    assert_allclose("dx", pair[0][0], pair[1][0], v["atol"], v["atol"])


def check_output(v: Values) -> None:
    """Three rows given by hand: the loss alone, or what was asked for and None for the rest."""
    x = torch.tensor([[0.2, -0.1], [1.0, 0.5], [-0.3, 0.7]], requires_grad=True)
    weight = torch.tensor([[0.5, -0.4], [-0.2, 0.3], [0.1, 0.6]])
    bias, target = torch.tensor([0.1, -0.2, 0.05]), torch.tensor([0, 1, 2])
    options = {name: v[name] for name in ("return_z_loss", "return_token_accuracy")}
    z = F.linear(x, weight, bias)
    expected, accuracy = F.cross_entropy(z, target), (z.argmax(-1) == target).float().mean()
    module = liger.LigerFusedLinearCrossEntropyLoss(**options)
    function = liger.liger_fused_linear_cross_entropy
    for result in (function(x, weight, target, bias, **options), module(weight, x, target, bias)):
        assert_allclose("loss", _loss(result), expected, 1e-6, 1e-5)
        assert isinstance(result, liger.CrossEntropyOutput) == any(options.values())
        if any(options.values()):
            assert (result.z_loss is not None) == v["return_z_loss"]
            assert (result.token_accuracy is not None) == v["return_token_accuracy"]
        if v["return_token_accuracy"]:
            assert_allclose("accuracy", result.token_accuracy, accuracy, 1e-6, 1e-5)
        assert gradients(_loss(result), x)[0].shape == x.shape


def check_predicted_tokens(v: Values) -> None:
    """By the logit of the predicted label, because equal ones may be told apart by rounding."""
    x, weight, bias, target = _draw(v, "randn")
    target[torch.randperm(len(target))[: len(target) // 4]] = v["ignore_index"]
    x.requires_grad_()
    options = {"ignore_index": v["ignore_index"], "reduction": v["reduction"]}
    result = liger.liger_fused_linear_cross_entropy(
        x, weight, target, bias, return_predicted_tokens=True, **options
    )
    predicted, counted = result.predicted_tokens, target != v["ignore_index"]
    assert predicted.shape == target.shape and predicted.dtype == torch.int64
    z = truth.logits(x.float(), weight.float(), None if bias is None else bias.float(), None)
    z = z.detach()[counted]
    chosen = z.gather(1, predicted[counted, None])[:, 0]
    assert_allclose("largest logit", chosen, z.max(-1).values, v["atol"], v["rtol"])
    assert (predicted[~counted] == -1).all()
    assert gradients(result.loss, x)[0].isfinite().all()


def check_upstream(v: Values) -> None:
    """Each row's loss has an upstream gradient of its own."""
    x, weight, bias, target = _draw({**v, "dtype": "fp32"}, "randn")
    operands = [None if y is None else y * 0.1 for y in (x, weight, bias)]
    ours, theirs = leaves(*operands), leaves(*operands)
    upstream = torch.rand(len(x)) + 0.5
    function = liger.liger_fused_linear_cross_entropy
    loss = function(ours[0], ours[1], target, ours[2], reduction="none")
    expected = F.cross_entropy(F.linear(*theirs), target, reduction="none")
    assert_allclose("loss", loss, expected, v["atol"], v["rtol"])
    pairs = (gradients(y, *z, upstream=upstream) for y, z in ((loss, ours), (expected, theirs)))
    for a, b in zip(*pairs):
        assert_allclose("gradient", a, b, v["atol"], v["rtol"])


def _scaling(test: str, **values) -> list:
    values = {"H": 8, "V": 16, "ignored": False, "module": False, "reduction": "sum", **values}
    return grid(SUITE, test, check_token_scaling, {}, **values)


HEAD = {**SHAPES, TOLERANCES: MEAN + SUM, "bias": BOTH, OPTIONS: [PLAIN, EVERYTHING]}
PREDICTED = {**SHAPES, TOLERANCES: MEAN, "bias": BOTH}
CAST = {"cast_dtype": ["bf16", "fp16"], "accum_dtype": [None, "fp32"], "bias": BOTH}
CASES = [
    *grid(SUITE, "test_correctness", check_module, HEAD, small, seed=42, grad=True),
    *grid(
        SUITE, "test_correctness_with_forward_only", check_module, HEAD, small, seed=42, grad=False
    ),
    *grid(
        SUITE,
        "test_correctness_functional",
        check_functional,
        {**TINY, "dtype atol rtol": [m[1:] for m in MEAN], "class_weights": BOTH, "bias": BOTH},
        seed=42,
    ),
    *grid(
        SUITE,
        "test_correctness_with_token_accuracy",
        check_token_accuracy,
        {**PREDICTED, "return_token_accuracy": BOTH},
        small,
        seed=42,
    ),
    *grid(
        SUITE, "test_amp", check_autocast, {**SHAPES, **CAST}, small, seed=42, atol=5e-3, rtol=5e-2
    ),
    *_scaling("test_correctness_token_scaling", reduction="none", atol=1e-4),
    *_scaling("test_correctness_token_scaling_consistency", atol=1e-6),
    *_scaling("test_correctness_token_scaling_functional", atol=1e-5),
    *_scaling("test_correctness_token_scaling_module", module=True, atol=1e-5),
    *_scaling("test_token_scaling_with_ignore_index", V=1000, ignored=True, atol=1e-5),
    *grid(
        SUITE,
        "test_liger_fused_linear_cross_entropy_structured_output",
        check_output,
        {"return_z_loss": BOTH, "return_token_accuracy": BOTH},
    ),
    *grid(
        SUITE,
        "test_correctness_with_predicted_tokens",
        check_predicted_tokens,
        {**PREDICTED, "ignore_index": [-100, 2]},
        small,
        seed=42,
    ),
    *grid(
        SUITE,
        "test_correctness_reduction_none_per_token_grad_output",
        check_upstream,
        {"B T H V": [(2, 16, 32, 64), (1, 32, 64, 128)], "bias": BOTH},
        seed=42,
        atol=1e-4,
        rtol=1e-4,
    ),
]
