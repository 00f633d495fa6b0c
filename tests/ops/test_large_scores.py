"""Maps of scores that all lie about the same large number, as those of keys with a large
component in common do. A normaliser of 500 is rounded by 1.5e-5 in fp32, and a given one was summed
from other roundings of the scores; what that leaves of a sum that is 0 must not be multiplied by
what the keys have in common."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from groundkern import KeySets, QueryRows
from tests.ops.random_calls import checking, truth
from tests.ops.random_calls.drawing import Drawn
from tests.ops.random_calls.truth import Selected
from tests.ops.test_contract import BACKENDS

KERNELS = [backend for backend in BACKENDS if backend != "reference"]
EPS = torch.finfo(torch.float32).eps
KINDS = ("map", "contribution", "rectified", "mean", "each")
# over, whether the log-sum-exp is given
NORMALISERS = (("visible", True), ("visible", False), ("columns", False))
COMMON = (50.0, -50.0, 500.0, -500.0)
each_backend = pytest.mark.parametrize("backend", KERNELS)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_normaliser = pytest.mark.parametrize(("over", "given"), NORMALISERS)


@dataclass(frozen=True)
class Shape:
    rows: int = 4
    heads: int = 6
    kv_heads: int = 2
    keys: int = 70
    dim: int = 48


ONE = Shape(rows=3, heads=3, kv_heads=1, keys=1)  # torch's gradient is exactly 0
SHAPES = {"some keys": Shape(), "one key": ONE, "one of each": Shape(1, 1, 1, 1, 1)}


def drawn(
    kind: str,
    over: str,
    given: bool,
    common: float,
    dtype: torch.dtype = torch.float32,
    shape: Shape = SHAPES["some keys"],
) -> Drawn:
    """A call whose scores are `common` and a few, by the first component of q and k."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    n, keys, dim = shape.rows, shape.keys, shape.dim
    part = abs(common * dim**0.5) ** 0.5
    q, k = normal(n, shape.heads, dim), normal(1, shape.kv_heads, keys, dim)
    q[..., 0], k[..., 0] = part, part if common > 0 else -part
    last = (torch.arange(n) * 23 + keys - 1) % keys
    rows = QueryRows.causal(torch.zeros(n, dtype=torch.int32), last.int())
    sets = torch.rand(2, keys, generator=generator) < 0.7
    sets[:, 0] = True
    options = {"rows": rows, "scale": None, "softcap": None, "over": over}
    options["allowed"] = KeySets.from_bool(sets, torch.arange(n).int() % 3 - 1)
    options["columns"] = torch.arange(0, keys, 2, dtype=torch.int32)[None]
    columns = options["columns"].shape[1]
    inputs = {"q": q.to(dtype), "k": k.to(dtype)}
    op, results = "kl", (n,)
    if kind in ("contribution", "rectified"):
        op, results = "contribution", (n, columns)
        options["rectify"] = kind == "rectified"
        inputs["v"] = normal(1, shape.kv_heads, keys, dim).to(dtype)
        inputs["g"] = normal(n, shape.heads, dim).to(dtype)
    elif kind == "map":
        op, results = "map", (n, columns)
    else:
        options["heads"] = kind
        inputs["target"] = normal(n, columns).square().float()
    trained = tuple(name for name in inputs if name != "target")
    found = Drawn(op, dtype, inputs, options, trained, notes={"upstream size": 1.0})
    options["lse"] = None
    if given:
        _, s = truth.scores(inputs["q"].double(), inputs["k"].double(), options)
        visible = Selected.of(options, keys).visible
        options["lse"] = truth.log_sum(s, visible).float()
    found.upstream = [(2 * torch.rand(results, generator=generator) - 1)]
    return found


def _shares(call: Drawn) -> Tensor:
    """The gradient of the scores [N, Hq, S] in fp64: a component of q that only one key has takes
    that key's."""
    q, k = call.inputs["q"].double(), call.inputs["k"].double()
    keys, own = k.shape[2], torch.eye(k.shape[2], dtype=torch.float64)
    q = torch.cat([q, q.new_zeros(*q.shape[:2], keys)], -1).requires_grad_()
    k = torch.cat([k, own.expand(*k.shape[:2], -1, -1)], -1)
    inputs = {**{n: x.double() for n, x in call.inputs.items()}, "q": q, "k": k}
    options = {**call.options, "scale": call.inputs["q"].shape[-1] ** -0.5}
    (result,) = truth.FUNCTIONS[call.op](inputs, options, Selected.of(options, keys))
    (dq,) = torch.autograd.grad(result, q, call.upstream[0].double())
    return dq[..., -keys:]


@each_backend
@each_kind
@each_normaliser
@pytest.mark.parametrize("common", COMMON)
def test_nothing_arrives_along_what_the_keys_have_in_common(
    backend: str, kind: str, over: str, given: bool, common: float
) -> None:
    call = drawn(kind, over, given, common)
    part, ds = call.inputs["k"][0, 0, 0, 0].abs(), _shares(call)
    arrived = checking.ours(call, backend).gradients["q"][..., 0].abs().max()
    size = part * ds.abs().sum(-1).max()  # of the terms of a sum that is 0
    assert size > 0 and arrived <= 4 * EPS * size


@each_backend
@each_kind
@each_normaliser
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SHAPES),
        ("some keys", torch.bfloat16),
        ("some keys", torch.float16),
    ],
)
def test_results_and_gradients_against_fp64(
    backend: str, kind: str, over: str, given: bool, name: str, dtype: torch.dtype
) -> None:
    for common in (-50.0, 500.0):
        call = drawn(kind, over, given, common, dtype, SHAPES[name])
        assert not checking.wrong(call, backend, twice=False), common


@each_backend
@pytest.mark.parametrize(("kind", "softcap"), list(product(KINDS, (None, 20.0))))
def test_a_given_normaliser_that_is_off_scales_p_and_not_the_softmaxs_gradient(
    backend: str, kind: str, softcap: float | None
) -> None:
    """As the reference has it: the given value, the gradient of the softmax."""
    call = drawn(kind, "visible", True, 1.0)
    call.options |= {"lse": call.options["lse"] + 0.3, "softcap": softcap}
    ours, theirs = (checking.ours(call, x) for x in (backend, "reference"))
    for name, x in ours.gradients.items():
        torch.testing.assert_close(x, theirs.gradients[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.results[0], theirs.results[0], rtol=1e-4, atol=1e-5)


# In Triton it reaches the keys of its tile, at which p is 0: to select what is seen would be 4 % of
# the instructions of the backward over visible keys (sm_90), and a step with NaN is lost anyway.
@pytest.mark.skipif("native" not in BACKENDS, reason="of the native kernels")
@each_kind
@pytest.mark.parametrize("where", ["k", "upstream", "lse"])
def test_nan_in_a_row_does_not_reach_keys_that_it_does_not_see(kind: str, where: str) -> None:
    call = drawn(kind, "visible", where != "k", 1.0)
    rows = call.options["rows"]
    first = torch.tensor([0, 30, 30, 30], dtype=torch.int32)
    stop = torch.tensor([9, 60, 50, 70], dtype=torch.int32)
    rows = QueryRows(rows.sequence, stop - 1, first, stop)
    call.options |= {"rows": rows, "allowed": None}
    k = call.inputs["k"]
    if where == "k":
        k[:, :, 2] = torch.nan
    elif where == "upstream":
        call.upstream[0][0] = torch.nan
    else:
        call.options["lse"][0] = torch.nan
    found = checking.ours(call, "native").gradients
    assert found["k"][0, :, :9].isnan().any() and found["q"][0].isnan().any()
    others = found["k"][0, :, 9:]
    assert others.any() and others.isfinite().all()
