"""The raw bindings of linear_cross_entropy: an error before memory is touched."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

of = importlib.import_module("tests.test_head_bindings")  # skips this file where _C is not built
D, N, V, BACKWARD, FORWARD, WRITTEN = of.D, of.N, of.V, of.BACKWARD, of.FORWARD, of.WRITTEN
call, padded, problem, view = of.call, of.padded, of.problem, of.view
with_buffers, with_everything = of.with_buffers, of.with_everything


def refused(direction: str, x: dict[str, Tensor | None], name: str, **replaced: object) -> None:
    before = {n: None if y is None else y.clone() for n, y in x.items()}
    with pytest.raises(ValueError, match=f"^`{name}`: expected .+, got .+"):
        call(direction, x, **replaced)
    for n, y in x.items():
        assert y is None or torch.equal(y.nan_to_num(9.0), before[n].nan_to_num(9.0)), n


@pytest.mark.parametrize("direction", WRITTEN)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_a_view_that_does_not_fit_is_refused(
    direction: str, softcap: float, own: bool, scores: bool
) -> None:
    plain = problem()
    if scores:
        plain = with_everything(plain)
    x = with_buffers(plain, softcap, own, scores)
    for name in FORWARD if direction == "forward" else BACKWARD:
        if x[name] is None:
            continue
        address, code, sizes, strides = view(x[name])
        bad = [(address, 2, sizes, strides), (0, code, sizes, strides)]
        bad += [(address, code, (*sizes, 1), strides), (address, code, sizes, (*strides[:-1], 2))]
        if name not in ("ids", "offsets", "target"):
            bad.append((address, code, (sizes[0] + 1, *sizes[1:]), strides))
        for value in bad:
            refused(direction, x, name, softcap=softcap, **{name: value})


@pytest.mark.parametrize("direction", WRITTEN)
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("target", 4, V),
        ("target", 0, -1),
        ("ids", 3, V),
        ("ids", 0, -1),
        ("offsets", 0, 1),
        ("offsets", 2, 2),
        ("offsets", 3, 9),
        ("index", 3, -2),
        ("index", 4, 3),
    ],
)
def test_labels_out_of_range_are_refused(direction: str, name: str, place: int, value: int) -> None:
    x = with_buffers(problem(), 0.0, own=True)
    x[name][place] = value
    refused(direction, x, name)


@pytest.mark.parametrize("direction", WRITTEN)
@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("smoothing", {"smoothing": 1.0}),
        ("smoothing", {"smoothing": math.nan}),
        ("label_smoothing", {"label_smoothing": 1.5}),
        ("label_smoothing", {"label_smoothing": math.nan}),
        ("z_loss", {"z_loss": -0.1}),
        ("z_loss", {"z_loss": math.inf}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": math.nan}),
        ("logits", {"logits": None}),
        ("logits", {"logits": None, "hidden": None, "weight": None}),
        ("softcap", {"softcap": -1.0}),
        ("slopes", {"softcap": 2.0}),
        ("threads", {"threads": 0}),
        ("vocabulary", {"vocabulary": 0}),
        ("logits", {"vocabulary": V + 40}),
        ("weight", {"vocabulary": V - 1}),
        ("weight", {"hidden": None}),
        ("weight", {"weight": None}),
        *(("ids", {name: None}) for name in ("ids", "offsets", "index")),
    ],
)
def test_numbers_that_do_not_fit_are_refused(direction: str, name: str, replaced: dict) -> None:
    refused(direction, with_buffers(problem(), 0.0, own=True), name, **replaced)


@pytest.mark.parametrize(
    ("name", "own", "replaced"),
    [
        ("dhidden", True, {"dhidden": None}),
        ("dlogits", False, {"dlogits": None}),
        ("dweight", False, {"dweight": torch.zeros(V, D)}),
        ("dbias", False, {"dbias": torch.zeros(V)}),
        ("dlogits", True, {"dlogits": torch.zeros(V, padded(N))}),
        ("dweight", True, {"dweight": torch.zeros(V, D, dtype=torch.bfloat16)}),
        ("scores", True, {"dentropy": torch.zeros(N)}),
    ],
)
def test_gradients_that_do_not_go_together(name: str, own: bool, replaced: dict) -> None:
    x = with_buffers(problem(), 0.0, own)
    views = {n: None if y is None else view(y) for n, y in replaced.items()}
    refused("backward", x, name, **views)


def test_arguments_that_do_not_go_together() -> None:
    spread = {"softcap": 1.5, "label_smoothing": 0.1}
    x = with_buffers(problem(), 1.5, own=True)
    call("forward", x, **spread)
    refused("backward", x, "scores", **spread)
    x = with_buffers(problem(bags=False), 0.0, own=True)
    for direction in WRITTEN:
        refused(direction, x, "weights", weights=view(torch.ones(3)))
        refused(direction, x, "logits", scores=view(torch.ones(padded(V), padded(N))))
    for columns in (0, 33):
        asked = {"top_ids": torch.full((N, columns), 3), "top_log_probs": torch.ones(N, columns)}
        refused("forward", x, "top_ids", **{name: view(y) for name, y in asked.items()})
    refused("forward", x, "top_ids", top_ids=view(torch.full((N, 2), 3)))


def test_bfloat16_is_refused_if_the_cpu_has_no_products_of_it(monkeypatch) -> None:
    monkeypatch.setenv("GROUNDKERN_CPU_ISA", of._C.cpu_isas()[-1])
    x = with_buffers(problem(torch.bfloat16), 0.0, own=True)
    for direction in WRITTEN:
        refused(direction, x, "weight")
