"""The raw bindings of linear_cross_entropy: right results."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")
view = importlib.import_module("tests.test_bindings").view  # it needs _C itself

N, V, D = 37, 300, 7  # two panels, three blocks; no tile divides V or D
NAMES = ("loss", "log_prob", "lse")
LABELS = ("target", "own", "ids", "weights", "offsets", "index", "class_weight")
BOTH = ("logits", "scores", "hidden", "weight", *LABELS, "tops", "terms", "slopes")
ASKED = ("entropy", "top_ids", "top_log_probs")
UPSTREAM = ("dloss", "dlog_prob", "dlse", "dentropy")
FORWARD = (*BOTH, "bias", *NAMES, "predicted", *ASKED)
BACKWARD = (*BOTH, *UPSTREAM, "dlogits", "dhidden", "dweight", "dbias")
WRITTEN = {"forward": (*NAMES, "predicted"), "backward": ("dhidden", "dweight")}
OFF = {"label_smoothing": 0.0, "z_loss": 0.0, "temperature": 1.0}
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.03, "temperature": 0.7}
K = 5
MULTIPLIES = {torch.float32: True, torch.bfloat16: _C.has_matrix_product(_C.bfloat16)}
DTYPES = tuple(MULTIPLIES)


def padded(size: int) -> int:
    return -(-size // _C.lanes) * _C.lanes


def problem(dtype: torch.dtype = torch.float32, *, bags: bool = True) -> dict[str, Tensor | None]:
    """hidden and weight, labels, and upstream gradients; some rows have no bag, or an empty one."""
    torch.manual_seed(0)
    x: dict[str, Tensor | None] = {
        "hidden": torch.randn(N, D).to(dtype),
        "weight": torch.randn(V, D).to(dtype),
        "bias": torch.randn(V),
        "target": torch.randint(V, (N,)).index_fill(0, torch.tensor([0, 1]), V - 1),
        "ids": torch.tensor([7, 7, 1, V - 1, 5, 130, 131, 299]),
        "offsets": torch.tensor([0, 3, 3, 8]),
        "index": torch.randint(-1, 3, (N,)).index_fill(0, torch.tensor([0]), 2),
        **{f"d{name}": torch.randn(N) for name in NAMES},
    }
    x |= dict.fromkeys(("own", "weights", "class_weight", "dentropy", *ASKED))
    return x if bags else x | dict.fromkeys(("ids", "offsets", "index"))


def with_everything(x: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Adds all that may be None: some weights are 0."""
    return x | {
        "own": torch.rand(N) * 2 * (torch.arange(N) % 5 != 2),
        "weights": torch.rand(len(x["ids"])) * 2 * (torch.arange(len(x["ids"])) != 4),
        "class_weight": torch.rand(V) * 2 * (torch.arange(V) % 6 != 1),
        "dentropy": torch.randn(N),
        "entropy": torch.full((N,), math.nan),
        "top_ids": torch.full((N, K), -7),
        "top_log_probs": torch.full((N, K), math.nan),
    }


def with_buffers(
    x: dict[str, Tensor | None], softcap: float, own: bool, scores: bool = False
) -> dict[str, Tensor | None]:
    """Adds all other arguments of both directions; `own`: with weight, for our own products."""
    dtype, entries = x["weight"].dtype, padded(V) if own else V
    capped = softcap > 0 and x["ids"] is not None and not scores
    logits = torch.full((entries, padded(N)), math.nan, dtype=dtype)
    if not own:
        logits[:, :N] = F.linear(x["hidden"], x["weight"]).T
    return x | {
        "logits": None if own and scores else logits,
        "scores": torch.full((entries, padded(N)), math.nan) if scores else None,
        "tops": torch.full((-(-V // _C.entries), padded(N)), math.nan),
        "terms": torch.full((_C.terms, padded(N)), math.nan),
        "slopes": torch.full((N, 5), math.nan) if capped else None,
        "hidden": x["hidden"] if own else None,
        "weight": x["weight"] if own else None,
        **{name: torch.full((N,), math.nan) for name in NAMES},
        "predicted": torch.full((N,), -7),
        "dlogits": None if own else torch.full_like(logits, math.nan),
        "dhidden": torch.full((N, D), math.nan, dtype=dtype) if own else None,
        "dweight": torch.full((V, D), math.nan, dtype=dtype) if own else None,
        "dbias": torch.zeros(V) if own else None,
    }


def call(direction: str, x: dict[str, Tensor | None], **replaced: object) -> None:
    names = FORWARD if direction == "forward" else BACKWARD
    views = {name: None if x[name] is None else view(x[name]) for name in names}
    options: dict[str, object] = {"smoothing": 0.25, "softcap": 0.0, "threads": 1, "vocabulary": V}
    options |= OFF
    if direction == "backward":
        options["add"] = False
    getattr(_C, f"linear_cross_entropy_{direction}")(**{**views, **options, **replaced})


def weights_of(x: dict[str, Tensor | None], label_smoothing: float) -> Tensor:
    """t [N, V] of the loss sum_y t_y (lse - z_y), with 0.25 as the share of a bag."""
    t = torch.zeros(N, V, dtype=torch.float64)
    for n, target in enumerate(x["target"].tolist()):
        own = 1.0 if x["own"] is None else float(x["own"][n])
        places = []
        if x["ids"] is not None and (bag := int(x["index"][n])) >= 0:
            places = range(int(x["offsets"][bag]), int(x["offsets"][bag + 1]))
        rest = [i for i in places if x["ids"][i] != target]
        for i in rest:
            share = 1.0 if x["weights"] is None else float(x["weights"][i])
            t[n, x["ids"][i]] += 0.25 / len(rest) * share
        t[n, target] += 0.75 * own if rest else own
    everywhere = torch.ones(V) if x["class_weight"] is None else x["class_weight"]
    return (1 - label_smoothing) * t + label_smoothing / V * everywhere


def expected(x: dict[str, Tensor | None], softcap: float, **options: float) -> dict[str, Tensor]:
    """By autograd in fp64: results, and the gradients with x's upstream ones."""
    o = OFF | options
    h, w, b = (x[n].double().requires_grad_() for n in ("hidden", "weight", "bias"))
    logits = F.linear(h, w, b)
    z = (softcap * torch.tanh(logits / softcap) if softcap else logits) / o["temperature"]
    log_p, lse = z.log_softmax(1), z.logsumexp(1)
    t = weights_of(x, o["label_smoothing"])
    loss = -torch.where(t > 0, t * log_p, 0.0).sum(1) + o["z_loss"] * lse**2
    results = [loss, log_p.gather(1, x["target"][:, None])[:, 0], lse]
    upstream = [x[f"d{name}"].double() for name in NAMES]
    if x["dentropy"] is not None:
        results.append(-torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(1))
        upstream.append(x["dentropy"].double())
    names = ("dhidden", "dweight", "dbias", "dlogits")
    gradients = torch.autograd.grad(results, (h, w, b, logits), upstream)
    top = log_p.sort(dim=1, descending=True, stable=True)
    return dict(zip((*NAMES, "entropy"), results)) | {
        **dict(zip(names, gradients)),
        "predicted": z.argmax(1),
        "top_ids": top.indices[:, :K],
        "top_log_probs": top.values[:, :K],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("bags", [False, True])
def test_our_own_products(dtype: torch.dtype, softcap: float, bags: bool) -> None:
    if not MULTIPLIES[dtype] and dtype == torch.bfloat16:
        pytest.skip("this CPU does not multiply bf16")
    x = with_buffers(problem(dtype, bags=bags), softcap, own=True)
    truth = expected(x, softcap)
    call("forward", x, softcap=softcap)
    saved = x["logits"].clone()
    call("backward", x, softcap=softcap)
    assert torch.equal(x["logits"], saved), "a second backward needs them"
    for name in NAMES:
        torch.testing.assert_close(x[name].double(), truth[name], rtol=2e-6, atol=4e-6)
    assert torch.equal(x["predicted"], truth["predicted"])
    allowed = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(x[name].double(), truth[name], **allowed)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("in_place", [False, True])
def test_logits_of_another_library(softcap: float, in_place: bool) -> None:
    plain = problem()
    x = with_buffers(plain, softcap, own=False)
    truth = expected(plain, softcap)
    call("forward", x, softcap=softcap)
    if in_place:
        x["dlogits"] = x["logits"]
    call("backward", x, softcap=softcap)
    for name in NAMES:
        torch.testing.assert_close(x[name].double(), truth[name], rtol=2e-6, atol=4e-6)
    got = x["dlogits"]
    torch.testing.assert_close(got[:, :N].double(), truth["dlogits"].T, rtol=1e-5, atol=1e-6)
    assert not got[:, N:].any(), "empty lanes have no gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("bags", [False, True])
def test_everything_at_once_with_our_own_products(
    dtype: torch.dtype, softcap: float, bags: bool
) -> None:
    if not MULTIPLIES[dtype] and dtype == torch.bfloat16:
        pytest.skip("this CPU does not multiply bf16")
    plain = with_everything(problem(dtype))
    if not bags:
        plain |= dict.fromkeys(("ids", "weights", "offsets", "index"))
    x = with_buffers(plain, softcap, own=True, scores=True)
    truth = expected(x, softcap, **EVERYTHING)
    call("forward", x, softcap=softcap, **EVERYTHING)
    saved = x["scores"].clone()
    call("backward", x, softcap=softcap, **EVERYTHING)
    assert torch.equal(x["scores"], saved), "a second backward needs them"
    for name in (*NAMES, "entropy", "top_log_probs"):
        torch.testing.assert_close(x[name].double(), truth[name], rtol=3e-6, atol=6e-6)
    for name in ("predicted", "top_ids"):
        assert torch.equal(x[name], truth[name])
    allowed = (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(x[name].double(), truth[name], **allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("in_place", [False, True])
def test_everything_at_once_with_logits_of_another_library(
    dtype: torch.dtype, softcap: float, in_place: bool
) -> None:
    plain = with_everything(problem(dtype))
    x = with_buffers(plain, softcap, own=False, scores=True)
    z = F.linear(plain["hidden"], plain["weight"]).double()  # rounded to the dtype
    z = {"hidden": torch.eye(N, dtype=torch.float64), "weight": z.T}
    truth = expected(plain | z, softcap, **EVERYTHING)
    if in_place and dtype == torch.float32:
        x["scores"] = x["logits"]
    call("forward", x, softcap=softcap, **EVERYTHING)
    if in_place:
        x["dlogits"] = x["logits"]
    call("backward", x, softcap=softcap, **EVERYTHING)
    for name in (*NAMES, "entropy", "top_log_probs"):
        torch.testing.assert_close(x[name].double(), truth[name], rtol=3e-6, atol=6e-6)
    assert torch.equal(x["top_ids"], truth["top_ids"])
    got = x["dlogits"]
    rtol, atol = (2e-5, 2e-6) if dtype == torch.float32 else (4e-3, 1e-5)
    torch.testing.assert_close(got[:, :N].double(), truth["dlogits"].T, rtol=rtol, atol=atol)
    assert not got[:, N:].any(), "empty lanes have no gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_exponentials_suffice_without_a_softcap(dtype: torch.dtype, own: bool) -> None:
    """All but the entropy's gradient; what was asked for is the same as with scores."""
    if own and not MULTIPLIES[dtype] and dtype == torch.bfloat16:
        pytest.skip("this CPU does not multiply bf16")
    plain = with_everything(problem(dtype)) | {"dentropy": None}
    runs = []
    for scores in (False, True):
        x = with_buffers(plain, 0.0, own, scores)
        call("forward", x, **EVERYTHING)
        call("backward", x, **EVERYTHING)
        runs.append(x)
    for name in (*NAMES, "predicted", *ASKED):
        assert torch.equal(runs[0][name], runs[1][name]), name
    names = ("dhidden", "dweight", "dbias") if own else ("dlogits",)
    allowed = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    for name in names:
        torch.testing.assert_close(runs[0][name], runs[1][name], **allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_number_of_threads(dtype: torch.dtype) -> None:
    if not MULTIPLIES[dtype] and dtype == torch.bfloat16:
        pytest.skip("this CPU does not multiply bf16")
    runs = []
    for threads in (1, 2, 3, 3, 40):
        x = with_buffers(problem(dtype), 1.5, own=True)
        for direction in WRITTEN:
            call(direction, x, softcap=1.5, threads=threads)
        runs.append([x[name] for names in WRITTEN.values() for name in names])
        x = with_buffers(with_everything(problem(dtype)), 1.5, own=True, scores=True)
        for direction in WRITTEN:
            call(direction, x, softcap=1.5, threads=threads, **EVERYTHING)
        names = (*WRITTEN["forward"], *ASKED, *WRITTEN["backward"])
        runs[-1] += [x[name] for name in names]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_a_gradient_is_added_in_fp32() -> None:
    for dtype in DTYPES:
        if not MULTIPLIES[dtype] and dtype == torch.bfloat16:
            continue
        x = with_buffers(problem(dtype), 0.0, own=True)
        call("forward", x)
        once, twice = torch.full((V, D), math.nan), torch.ones(V, D)
        call("backward", x | {"dweight": once})
        call("backward", x | {"dweight": twice}, add=True)
        torch.testing.assert_close(twice, once + 1)
        call("backward", x)
        torch.testing.assert_close(x["dweight"], once.to(dtype))


@pytest.mark.parametrize("missing", [("dloss",), ("dlog_prob", "dlse"), ("dweight", "dbias")])
def test_gradients_that_are_not_requested(missing: tuple[str, ...]) -> None:
    x = with_buffers(problem(), 0.0, own=True)
    call("forward", x)
    zeros = {n: torch.zeros(N) for n in missing if x[n].shape == (N,)}
    call("backward", x | zeros)
    wanted = x["dhidden"].clone()
    call("backward", x | dict.fromkeys(missing))
    assert torch.equal(x["dhidden"], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_at_any_address(dtype: torch.dtype) -> None:
    if not MULTIPLIES[dtype] and dtype == torch.bfloat16:
        pytest.skip("this CPU does not multiply bf16")
    plain = problem(dtype)
    for depth in (D, D - 1):  # rows of an even depth are read in place
        cut = {
            "hidden": plain["hidden"][:, 1 : depth + 1],
            "weight": plain["weight"][:, 1 : depth + 1],
        }
        x = {**plain, "hidden": torch.randn(N, 11).to(dtype), "weight": torch.randn(V, 9).to(dtype)}
        for name, part in cut.items():
            width = part.shape[1]
            x[name][:, 1 : width + 1] = part
            x[name] = x[name][:, 1 : width + 1]
        assert x["weight"].stride() == (9, 1)
        results = []
        for one in (x, {**plain, **{n: y.contiguous() for n, y in cut.items()}}):
            one = with_buffers(one, 0.0, own=True)
            one["dhidden"] = torch.empty(N, cut["hidden"].shape[1], dtype=dtype)
            one["dweight"] = torch.empty(V, cut["hidden"].shape[1], dtype=dtype)
            for direction in WRITTEN:
                call(direction, one)
            results.append([one[name] for names in WRITTEN.values() for name in names])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_infinities_and_nan_stay_in_their_rows() -> None:
    x = problem(bags=False)
    x["hidden"][3, 0] = math.nan
    x["hidden"][5] = math.inf
    x = with_buffers(x, 0.0, own=True)
    for direction in WRITTEN:
        call(direction, x)
    bad = torch.isin(torch.arange(N), torch.tensor([3, 5]))
    assert x["loss"][bad].isnan().all() and x["dhidden"][bad].isnan().all()
    assert x["loss"][~bad].isfinite().all() and x["dhidden"][~bad].isfinite().all()


def test_a_vocabulary_entry_of_probability_zero() -> None:
    """A logit of -inf adds nothing to the sum, and has no gradient."""
    x = problem(bags=False)
    x["bias"][200] = -math.inf
    x["target"][x["target"] == 200] = 0
    truth = expected(x, 0.0)
    x = with_buffers(x, 0.0, own=True)
    for direction in WRITTEN:
        call(direction, x)
    torch.testing.assert_close(x["loss"].double(), truth["loss"], rtol=1e-6, atol=1e-6)
    assert not x["dweight"][200].any() and x["dhidden"].isfinite().all()


size = st.tuples(st.integers(-1, 5), st.integers(-1, 5))
stride = st.tuples(st.integers(-2, 70), st.integers(0, 2))


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(sizes=st.tuples(size, size), strides=st.tuples(stride, stride))
def test_any_views_of_hidden_and_weight(sizes: tuple, strides: tuple) -> None:
    """Within valid memory: a right result, or an error before memory is touched."""
    memory = torch.randn(2, 512)
    (rows, depth), (entries, depth_w) = sizes
    target = torch.zeros(max(rows, 0), dtype=torch.int64)
    x = {
        "logits": torch.full((padded(max(entries, 1)), padded(len(target))), math.nan),
        "tops": torch.zeros(1, padded(len(target))),
        "terms": torch.zeros(_C.terms, padded(len(target))),
        "target": target,
        **dict.fromkeys((*LABELS[1:], "scores", "slopes", "bias", *ASKED)),
        **{name: torch.full(target.shape, math.nan) for name in NAMES},
        "predicted": torch.full(target.shape, -7),
        "hidden": None,
        "weight": None,
    }
    views = {
        name: (memory[i].data_ptr(), _C.float32, sizes[i], strides[i])
        for i, name in enumerate(("hidden", "weight"))
    }
    legal = min(rows, depth) >= 0 and entries >= 1 and depth == depth_w
    for (down, across), (step, one) in zip(sizes, strides, strict=True):
        used = down > 0 and across > 0
        legal = legal and not (used and down > 1 and step < 0)
        legal = legal and not (used and across > 1 and one != 1)
    if not legal:
        with pytest.raises(ValueError, match=r"^`(hidden|weight|vocabulary)`: expected"):
            call("forward", x, **views, vocabulary=entries)
        assert x["loss"].isnan().all() and x["logits"].isnan().all()
        return
    call("forward", x, **views, vocabulary=entries, smoothing=0.0)
    h, w = (memory[i].as_strided(sizes[i], [max(s, 0) for s in strides[i]]) for i in range(2))
    torch.testing.assert_close(x["lse"], (h @ w.T).logsumexp(1), rtol=1e-5, atol=1e-5)
