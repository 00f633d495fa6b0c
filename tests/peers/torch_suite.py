"""torch 2.13, `nn.functional.linear_cross_entropy`: the samples of its OpInfo (three variants) and
of its ModuleInfo, and their errors.

torch runs each sample through many tests of its own machinery; here a sample's loss and gradients
are held to plain torch from the same values in fp32 (fp64), by `torch.testing.assert_close`.
`options`, which says how torch cuts a batch, is passed on: it has no effect.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import make_tensor

from groundkern.compat.torch import linear_cross_entropy
from tests import closeness
from tests.peers.case import (
    FLOATS,
    Case,
    Values,
    gradients,
    leaves,
    rounds_before_products,
    same_size,
)

SUITE = "torch linear_cross_entropy"
DTYPES = ["fp32", "fp64", "fp16", "bf16"]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # since torch 2.13


def check(v: Values) -> None:
    s = _sample(SimpleNamespace(**v))
    # Losses are compared as their gradients are: against an uneven upstream.
    arguments = {
        "weight": s.class_weight,
        "reduction": v["reduction"],
        "ignore_index": v["ignore_index"],
        "label_smoothing": v["label_smoothing"],
    }
    ours = leaves(s.input, s.weight, s.bias)
    loss = linear_cross_entropy(
        ours[0], ours[1], s.target, linear_bias=ours[2], options=_options(v), **arguments
    )
    wide = torch.float64 if v["dtype"] == "fp64" else torch.float32
    theirs = leaves(*(None if x is None else x.to(wide) for x in (s.input, s.weight, s.bias)))
    expected = _plain(theirs, s, arguments, wide)
    assert loss.dtype == s.input.dtype
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=wide).view(loss.shape)
    upstream = upstream.to(loss.dtype)
    results = [loss, *gradients(loss, *ours, upstream=upstream)]
    truths = [expected, *gradients(expected, *theirs, upstream=upstream.to(wide))]
    rounded = [None] * len(results)
    if rounds_before_products(s.input.dtype):
        own = leaves(s.input, s.weight, s.bias)
        rounded[1:] = gradients(_plain(own, s, arguments, s.input.dtype), *own, upstream=upstream)
    for result, naive, truth in zip(results, rounded, truths):
        if naive is None:
            torch.testing.assert_close(result, truth.to(result.dtype), equal_nan=True)
        else:
            closeness.assert_close("gradient", result, naive, truth, closeness.GRADIENTS)


def _options(v: Values):
    return None if v["options"] is None or OPTIONS is None else OPTIONS(**v["options"])


def _plain(operands: list, s: SimpleNamespace, arguments: dict, wide: torch.dtype) -> Tensor:
    x, weight, bias = operands
    z = F.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())
    z = z.view(*x.shape[:-1], *weight.shape[:-1])
    class_weight = None if s.class_weight is None else s.class_weight.to(wide)
    target = s.target.to(wide) if s.target.is_floating_point() else s.target
    ignore_index = -100 if arguments["ignore_index"] is None else arguments["ignore_index"]
    options = {**arguments, "weight": class_weight, "ignore_index": ignore_index}
    return F.cross_entropy(z, target, **options)


def _sample(v: SimpleNamespace) -> SimpleNamespace:
    """Tensors of one sample. The OpInfo's are uniform in [-2, 2), the ModuleInfo's as its module
    and `randn` make them."""
    dtype = FLOATS[v.dtype]
    classes, places, batch = v.classes, v.places, v.batch
    shape = (classes, *places, v.features)
    if v.source == "op":
        input, weight = (
            make_tensor(s, dtype=dtype, device="cpu", low=-2, high=2)
            for s in ((*batch, v.features), shape)
        )
        bias = make_tensor(shape[:-1], dtype=dtype, device="cpu") if v.bias else None
    else:
        flat = torch.nn.Linear(v.features, weight_rows(shape), bias=v.bias, dtype=dtype)
        input, weight = torch.randn(*batch, v.features, dtype=dtype), flat.weight.view(shape)
        bias = flat.bias.view(shape[:-1]) if v.bias else None
    class_weight = None
    if v.class_weights:
        exponential = torch.exp(torch.randn(classes, dtype=dtype))
        uniform = make_tensor((classes,), dtype=dtype, device="cpu", low=0.5, high=2)
        class_weight = uniform if v.source == "op" else exponential
    if v.probabilities:
        target = make_tensor((*batch, classes, *places), dtype=dtype, device="cpu", low=0, high=1)
    else:
        target = _labels(v, torch.randint(0, classes, (*batch, *places)))
    return SimpleNamespace(
        input=input, weight=weight, bias=bias, class_weight=class_weight, target=target
    )


def weight_rows(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-1]).numel()


def _labels(v: SimpleNamespace, target: Tensor) -> Tensor:
    """With one row ignored, all of them, or those that happen to be; a mean has at least one that
    counts."""
    if v.ignored == "all":
        return torch.full_like(target, v.ignore_index)
    if v.ignored == "one":
        target[len(target) // 2] = v.ignore_index
        if not 0 <= v.ignore_index < v.classes:
            target[0] = 0
    if v.reduction == "mean" and v.ignore_index is not None and (target == v.ignore_index).all():
        target[0 if target.dim() else ()] = (v.ignore_index + 1) % v.classes
    return target


PLAIN = {
    "reduction": "mean",
    "ignore_index": None,
    "label_smoothing": 0.0,
    "class_weights": False,
    "bias": False,
    "options": None,
    "ignored": "",
}


def _op_choices(variant: str, dtype: str) -> Iterator[dict]:
    """Options of the OpInfo's samples."""
    if not variant:
        yield from ({}, {"reduction": "sum"}, {"reduction": "none"})
        yield from ({"class_weights": True, "reduction": r} for r in REDUCTIONS)
        yield from ({"ignore_index": 1}, {"bias": True})
        yield {"bias": True, "class_weights": True, "reduction": "sum"}
        return
    none = variant == "chunked_none"
    two = {"options": {"batch_chunk_size": 2, "allow_retain_graph": not none}}
    three = {"options": {**two["options"], "batch_chunk_size": 3}}
    reductions = ["none"] if none else ["mean", "sum"]
    yield from ({"reduction": r, **two} for r in reductions)
    yield from ({"reduction": r, **three} for r in reductions)
    yield from ({"reduction": r, "class_weights": True, **two} for r in reductions)
    if none:
        biased = {"bias": True, "reduction": "none", **two}
        yield from (biased, {**biased, "class_weights": True}, {**biased, "ignore_index": 1})
    else:
        yield {"ignore_index": 1, **two}
        yield {"ignore_index": 1, "class_weights": True, **two}
        yield {"bias": True, **two}
        yield {"bias": True, "class_weights": True, "reduction": "sum", **two}
        yield {"bias": True, "ignore_index": 1, **two}
    if dtype in ("fp16", "bf16"):
        wide = {"acc_dtype": torch.float32, "allow_retain_graph": not none}
        yield from ({"reduction": r, "options": wide} for r in reductions)


def _op_heads() -> Iterator[dict]:
    """(batch, classes, places, features): of [2, 3] and [2, 1, 2, 1] rows torch makes the head."""
    for features, out in ((3, 4), (8, 8)):
        for batch in ((), (8,)):
            yield {"batch": batch, "classes": out, "places": (), "features": features}
        yield {"batch": (out,), "classes": 2, "places": (3,), "features": features}
    yield {"batch": (4,), "classes": 2, "places": (1, 2, 1), "features": 2}


def _op_samples(variant: str) -> Iterator[Case]:
    for dtype, probabilities in itertools.product(DTYPES, (False, True)):
        for choice, head in itertools.product(_op_choices(variant, dtype), _op_heads()):
            if probabilities and "ignore_index" in choice:
                continue
            shared = {"dtype": dtype, "probabilities": probabilities, "source": "op"}
            test = f"OpInfo samples {variant}".strip()
            yield Case(SUITE, test, {**PLAIN, **head, **choice, **shared}, check, same_size)


def _module_heads() -> Iterator[dict]:
    batched = {"batch": (8,), "features": 5, "classes": 4}
    for options in (None, {}, {"batch_chunk_size": 2}):
        yield {**batched, "options": options}
    for ratio in (2, 4):
        yield {**batched, "options": {"chunking_method": f"aspect_ratio:{ratio}"}}
    for options in (None, {}):
        yield {"batch": (), "features": 8, "classes": 4, "options": options}


def _module_choices(head: dict) -> Iterator[dict]:
    classes, batched = head["classes"], len(head["batch"]) > 0
    ignored = [None, -100, (classes - 1) // 2, classes + 5]
    places = [(), (3, 2, 4)] if batched else [()]
    axes = (["sum", "mean", "none"], ignored, [0.0, 0.1], [False, True], places)
    names = ("reduction", "ignore_index", "label_smoothing", "class_weights", "places")
    for choice in itertools.product(*axes):
        v = {**PLAIN, **head, **dict(zip(names, choice))}
        if v["ignore_index"] is None:
            yield {**v, "probabilities": False}
            if v["options"] is None:
                yield {**v, "probabilities": True}
        elif v["reduction"] != "sum":
            yield {**v, "probabilities": False}
            if batched:
                yield {**v, "probabilities": False, "ignored": "one"}
            if v["reduction"] != "mean":
                yield {**v, "probabilities": False, "ignored": "all"}


def _module_biased() -> Iterator[dict]:
    chunked = {"allow_retain_graph": True, "batch_chunk_size": 2}
    batched = {"batch": (8,), "features": 5, "classes": 4}
    single = {"batch": (), "features": 8, "classes": 4}
    yield from ({**batched, "places": (), "options": options} for options in (None, chunked))
    yield {**batched, "places": (3, 2, 4), "options": None}
    yield from ({**single, "places": (), "options": options} for options in (None, chunked))


def _module_samples() -> Iterator[Case]:
    for dtype in DTYPES:
        for head in _module_heads():
            for choice in _module_choices(head):
                values = {**choice, "dtype": dtype, "source": "module"}
                yield Case(SUITE, "ModuleInfo samples", values, check, same_size)
        for head in _module_biased():
            values = {**PLAIN, **head, "bias": True, "probabilities": False, "dtype": dtype}
            values["source"] = "module"
            yield Case(SUITE, "ModuleInfo samples", values, check, same_size)


def check_error(v: Values) -> None:
    """What torch refuses we refuse, by the argument's name."""
    draw = {"float": torch.float32, "long": torch.int64}
    x, weight = torch.randn(v["x"]), torch.randn(v["w"])
    target = torch.zeros(v["target"], dtype=draw[v["of"]])
    options = {**v["options"]}
    for name in ("linear_bias", "weight"):
        if name in options:
            options[name] = torch.ones(options[name])
    with pytest.raises((ValueError, TypeError), match=f"`{v['names']}`"):
        linear_cross_entropy(x, weight, target, **options)


def _errors() -> Iterator[Case]:
    rows = [
        ("OpInfo errors", (2, 3, 3), (2, 3), (3, 2), "float", {}, "input"),
        ("OpInfo errors", (2, 3), (2,), (2, 2), "float", {}, "linear_weight"),
        ("OpInfo errors", (2, 3), (2, 4), (2, 2), "float", {}, "linear_weight"),
        ("OpInfo errors", (2, 3), (2, 3), (2, 2), "float", {"ignore_index": 0}, "ignore_index"),
        ("OpInfo errors", (3,), (2, 4, 3), (2, 4), "float", {}, "input"),
        ("OpInfo errors", (2, 3), (2, 3), (2,), "float", {"linear_bias": 3}, "linear_bias"),
        ("ModuleInfo errors", (4, 3), (2, 3), (4, 2), "long", {}, "target"),
        ("ModuleInfo errors", (4, 3), (2, 3), (5, 2), "float", {}, "target"),
        ("ModuleInfo errors", (4, 5), (2, 3), (4, 2), "float", {}, "linear_weight"),
        ("ModuleInfo errors", (4, 3), (2, 3), (4, 2), "float", {"weight": 3}, "weight"),
        (
            "ModuleInfo errors",
            (4, 3),
            (2, 3),
            (4, 2),
            "float",
            {"label_smoothing": 2.0},
            "label_smoothing",
        ),
    ]
    keys = ("x", "w", "target", "of", "options", "names")
    for test, *row in rows:
        yield Case(SUITE, test, dict(zip(keys, row)), check_error, same_size)


VARIANTS = ("", "chunked", "chunked_none")
CASES = [
    *itertools.chain.from_iterable(_op_samples(variant) for variant in VARIANTS),
    *_module_samples(),
    *_errors(),
]
