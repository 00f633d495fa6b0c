"""On a GPU: tensors beyond 2^31 elements, no host sync, whole steps in CUDA graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from groundkern import (
    KeySets,
    QueryRows,
    attention_contribution,
    attention_kl,
    attention_map,
    linear_cross_entropy,
    set_logit_budget,
    set_logit_dtype,
    side_attention,
)
from tests.ops.on_gpu import CUDA, DIM, assert_same_predictions, captured, large, no_sync

pytestmark = pytest.mark.gpu

LONG, KV_HEADS, HEADS = 2**21 + 96, 8, 16  # 8 x LONG x 128 > 2^31
WINDOW = 1000
FIRST = 1000  # keys at the start that a row sees
LAST = WINDOW + 200  # keys at the end that a row sees


def _long_inputs() -> tuple[Tensor, Tensor, Tensor, QueryRows]:
    """k and v whose last head lies beyond 2^31; rows at both ends of the sequence."""
    q = torch.randn(4, HEADS, DIM, device=CUDA, dtype=torch.bfloat16)
    k, v = (
        torch.randn(1, KV_HEADS, LONG, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2)
    )
    assert k.numel() > 2**31
    last = torch.tensor([5, 900, LONG - 2, LONG - 1], device=CUDA)
    rows = QueryRows.causal(torch.zeros_like(last), last, window=WINDOW)
    return *(x.requires_grad_() for x in (q, k, v)), rows


def _ends(x: Tensor) -> Tensor:
    """The keys that some row sees: [Hkv, FIRST + LAST, D]."""
    return torch.cat([x[0, :, :FIRST], x[0, :, LONG - LAST :]], 1).detach()


def _visible(rows: QueryRows) -> Tensor:
    """Which of them each row sees: bool [N, FIRST + LAST]."""
    j = torch.cat([torch.arange(FIRST), torch.arange(LONG - LAST, LONG)]).to(CUDA)
    return (j >= rows.start[:, None]) & (j < rows.stop[:, None])


def _plain(q: Tensor, k: Tensor, rows: QueryRows) -> Tensor:
    """p [N, Hkv, group, FIRST + LAST] in fp32."""
    s = torch.einsum("nkgd,ksd->nkgs", q.float().unflatten(1, (KV_HEADS, -1)), k.float())
    return (s * DIM**-0.5).masked_fill(~_visible(rows)[:, None, None], -torch.inf).softmax(-1)


@large
def test_side_attention_beyond_2_to_the_31() -> None:
    q, k, v, rows = _long_inputs()
    out, lse = side_attention(q, k, v, rows, backend="triton")
    ends = [x.requires_grad_() for x in (q.detach().clone(), _ends(k), _ends(v))]
    p = _plain(ends[0], ends[1], rows)
    plain = torch.einsum("nkgs,ksd->nkgd", p, ends[2].float()).flatten(1, 2)
    torch.testing.assert_close(out.float(), plain, rtol=2e-2, atol=2e-3)
    assert lse.isfinite().all()
    upstream = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    expected = torch.autograd.grad(plain, ends, upstream.float())
    for got, wanted in zip((dq, _ends(dk), _ends(dv)), expected, strict=True):
        assert (got.float() - wanted.float()).abs().max() <= 3e-2 * wanted.abs().max()
    for x in (dk, dv):
        assert not x[:, :, FIRST : LONG - LAST].any(), "keys no row sees"


@large
def test_maps_beyond_2_to_the_31() -> None:
    q, k, _, rows = _long_inputs()
    listed = torch.tensor([3, 700, LONG - 500, LONG - 3], device=CUDA)
    columns = listed.int()[None].contiguous()
    maps = attention_map(q, k, rows, columns, over="visible", backend="triton")
    ends = [x.requires_grad_() for x in (q.detach().clone(), _ends(k))]
    at = torch.where(listed < FIRST, listed, listed - (LONG - LAST) + FIRST)
    plain = _plain(*ends, rows).flatten(1, 2).mean(1)[:, at]
    torch.testing.assert_close(maps, plain, rtol=1e-3, atol=1e-6)
    assert (plain > 0).sum() == 7  # of 16: 1, 2, 2 and 2 of the four rows
    upstream = torch.rand_like(maps)
    gradients = torch.autograd.grad(maps, (q, k), upstream)
    expected = torch.autograd.grad(plain, ends, upstream)
    for got, wanted in zip((gradients[0], _ends(gradients[1])), expected, strict=True):
        assert (got.float() - wanted.float()).abs().max() <= 3e-2 * wanted.abs().max()


@large
@pytest.mark.parametrize(
    ("dtype", "logits"),
    [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float32, None)],
    ids=str,
)
def test_logits_beyond_2_to_the_31(dtype: torch.dtype, logits: torch.dtype | None) -> None:
    """One chunk with all logits gives what many chunks give; in 16 bits, up to the last place of a
    logit, which another order of sums may round otherwise."""
    rows, vocabulary, dim = 16_384, 151_936, 256
    assert rows * vocabulary > 2**31
    hidden = torch.randn(rows, dim, device=CUDA).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, dim, device=CUDA) * dim**-0.5).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows,), device=CUDA)

    def run(budget: int | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        set_logit_budget(budget)
        set_logit_dtype(logits)
        try:
            result = linear_cross_entropy(hidden, weight, target, backend="triton")
            return result, torch.autograd.grad(result.loss, (hidden, weight))
        finally:
            set_logit_budget(None)
            set_logit_dtype(None)

    (results, gradients), (expected, expected_gradients) = run(2**36), run(None)
    place = 1e-4
    if dtype == torch.bfloat16 and logits is None:
        place = torch.finfo(dtype).eps * float(results[2].abs().max())
    for a, b in zip(results[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=place)
    operands = hidden.detach(), weight.detach()
    assert_same_predictions(results[3], expected[3], *operands, apart=max(1e-5, place))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a.float() - b.float()).abs().max() <= 2e-2 * b.abs().max()


N, KEYS, COLUMNS, VOCABULARY = 64, 4096, 1024, 32_064


def _attention_step(name: str) -> tuple[Callable, dict[str, Tensor], dict[str, object]]:
    q, g = (torch.randn(N, 28, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 4, KEYS, DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    position = torch.arange(KEYS - N, KEYS, device=CUDA)
    rows = QueryRows.causal(torch.zeros_like(position), position)
    visual = torch.arange(KEYS, device=CUDA)[None] < 3 * KEYS // 4
    index = torch.zeros(N, dtype=torch.int32, device=CUDA)
    sets = KeySets.from_bool(~visual | (torch.arange(KEYS, device=CUDA) < 20), index)
    if name == "side_attention":
        return side_attention, {"q": q, "k": k, "v": v}, {"rows": rows, "allowed": sets}
    options = {"rows": rows, "columns": torch.arange(COLUMNS, device=CUDA).int()[None]}
    function, *rest = name.split(" ")
    options["over"] = rest[0]
    if function == "attention_contribution":
        return attention_contribution, {"q": q, "k": k, "v": v, "g": g}, options
    if function == "attention_map":
        return attention_map, {"q": q, "k": k}, options
    options |= {"target": torch.rand(N, COLUMNS, device=CUDA), "heads": rest[1]}
    return attention_kl, {"q": q, "k": k}, options | ({"allowed": sets} if "sets" in rest else {})


STEPS = (
    "side_attention",
    "attention_map visible",
    "attention_contribution columns",
    *(f"attention_kl {o} {h}" for o in ("visible", "columns") for h in ("mean", "each")),
    "attention_kl columns mean sets",
    "linear_cross_entropy",
)


def _step(name: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns the result and the gradients."""
    if name == "linear_cross_entropy":
        hidden, weight = (torch.randn(n, 28 * DIM, device=CUDA).bfloat16() for n in (N, VOCABULARY))
        function, inputs = linear_cross_entropy, {"hidden": hidden, "weight": weight}
        options = {"target": torch.randint(VOCABULARY, (N,), device=CUDA)}
    else:
        function, inputs, options = _attention_step(name)
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}

    def run() -> tuple[Tensor, ...]:
        result = function(**leaves, **options, backend="triton")
        result = result if isinstance(result, Tensor) else result[0]
        gradients = torch.autograd.grad(result.float().square().sum(), list(leaves.values()))
        return result.detach(), *gradients

    return run


@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits(name: str) -> None:
    run = _step(name)
    run()  # compiles
    with no_sync():
        run()


@pytest.mark.parametrize("name", STEPS)
def test_forward_and_backward_are_captured_in_a_graph(name: str) -> None:
    """Every replay returns the same bits, and so does the step outside the graph, unless cuBLAS
    chooses another GEMM there."""
    outside, inside, replay = captured(_step(name))
    replays = []
    for _ in range(2):
        for x in inside:
            x.fill_(torch.nan)
        replay()
        replays.append([x.clone() for x in inside])
    for a, b, expected in zip(*replays, outside, strict=True):
        assert torch.equal(a, b)
        if name == "linear_cross_entropy":
            assert (a.float() - expected.float()).abs().max() <= 2e-2 * expected.abs().max()
        else:
            assert torch.equal(a, expected)
