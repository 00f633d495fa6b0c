"""Triton linear cross entropy on a GPU, at the sizes that people train."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundkern import LabelBags, linear_cross_entropy, set_logit_budget, set_logit_dtype
from groundkern.ops.cases import Call
from tests.closeness import GRADIENTS, VALUES, assert_close
from tests.ops.on_gpu import CUDA, assert_same_predictions, captured, large, no_sync
from tests.ops.test_contract import differentiate

pytestmark = pytest.mark.gpu

SHAPES = {  # D, V
    "small": (768, 50_257),
    "qwen3_vl_2b": (2048, 151_936),
    "qwen2_5_vl_7b": (3584, 152_064),
}
# 137 and 512 rows are memory-bound and fit one chunk; 1024 just fit one in the backward. The fp64
# oracle needs gigabytes for a head of full size.
SIZES = [
    pytest.param(shape, rows, marks=() if shape == "small" else large, id=f"{shape}-{rows}")
    for shape in SHAPES
    for rows in (137, 512, 1024)
]


@pytest.fixture(autouse=True)
def _default_budget() -> Iterator[None]:
    yield
    set_logit_budget(None)
    set_logit_dtype(None)


def _call(shape: str, rows: int, dtype=torch.bfloat16, **options) -> Call:
    """Some rows are ignored; most others are smoothed over the labels of two images, one of which
    repeats an id."""
    dim, vocabulary = SHAPES[shape]
    draw = torch.Generator(CUDA).manual_seed(rows)
    hidden = torch.randn(rows, dim, device=CUDA, generator=draw).to(dtype)
    weight = torch.randn(vocabulary, dim, device=CUDA, generator=draw).mul_(dim**-0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), device=CUDA, generator=draw)
    target[::7] = -100
    ids = torch.randint(vocabulary, (150,), device=CUDA, generator=draw)
    ids[3], ids[5] = ids[4], target[1]
    index = torch.randint(-1, 2, (rows,), device=CUDA, generator=draw)
    bags = LabelBags(ids, torch.tensor([0, 50, 150], device=CUDA), index)
    options = {"target": target, "bags": bags, "smoothing": 0.3, **options}
    options["row_weight"] = torch.rand(rows, device=CUDA, generator=draw)
    inputs = {"hidden": hidden, "weight": weight}
    return Call(linear_cross_entropy, inputs, {**options, "backend": "triton"})


def _plain(call: Call, dtype: torch.dtype) -> tuple[tuple, list[Tensor]]:
    """Plain torch, without a loop over rows on the device: (results, gradients)."""
    target, bags, b = (call.options[n] for n in ("target", "bags", "smoothing"))
    offsets, ids, images = (x.tolist() for x in (bags.offsets, bags.ids, bags.index))
    terms = []  # (row, label, share)
    for row, label in enumerate(target.tolist()):
        if label == -100:
            continue
        image = images[row]
        bag = ids[offsets[image] : offsets[image + 1]] if image >= 0 else []
        rest = [y for y in bag if y != label]
        terms.append((row, label, 1 - b if rest else 1.0))
        terms += [(row, y, b / len(rest)) for y in rest]
    row, label, share = (torch.tensor(x, device=target.device) for x in zip(*terms, strict=True))
    counted = target != -100

    def function(hidden, weight, *, row_weight, **_):
        z = torch.nn.functional.linear(hidden, weight)
        z = z if dtype == torch.float64 else z.float()
        log_p = z.log_softmax(-1)
        share_of = (share * row_weight[row]).to(z.dtype)
        loss = -(log_p[row, label] * share_of).sum() / counted.sum()
        log_prob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        predicted = torch.where(counted, z.argmax(1), -1)
        return loss, log_prob.detach() * counted, z.logsumexp(1).detach() * counted, predicted

    return differentiate(call, function, dtype)


@pytest.mark.parametrize(("shape", "rows"), SIZES)
def test_values_and_gradients(shape: str, rows: int) -> None:
    call = _call(shape, rows)
    (*ours, predicted), gradients = differentiate(call)
    (*plain, _), plain_gradients = _plain(call, torch.bfloat16)
    (*truth, likeliest), true_gradients = _plain(call, torch.float64)
    for name, *xs in zip(("loss", "log_prob", "lse"), ours, plain, truth, strict=True):
        assert_close(name, *xs, VALUES)
    for name, *xs in zip(call.inputs, gradients, plain_gradients, true_gradients, strict=True):
        assert_close(f"d{name}", *xs, GRADIENTS)
    counted = call.options["target"] != -100
    assert (predicted[~counted] == -1).all()
    hidden, weight = call.inputs.values()
    # Logits of 16-bit products are rounded to 16 bits: two of them, by half a last place each.
    apart = torch.finfo(torch.bfloat16).eps * float(ours[2].abs().max())
    found = predicted[counted], likeliest[counted]
    assert_same_predictions(*found, hidden[counted], weight, apart=apart)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_host_never_waits(trained: bool) -> None:
    call = _call("small", 137)
    call = replace(call, fixed=() if trained else ("weight",))
    differentiate(call)  # compiles
    inputs = {n: x.clone().requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    with no_sync():
        call.run(**inputs)[0].backward()


def test_the_forward_is_captured_in_a_graph() -> None:
    set_logit_dtype(torch.float32)  # or a sum in another order could round to another 16 bits
    call = _call("small", 137, reduction="none")
    hidden = call.inputs["hidden"].clone()
    _, inside, replay = captured(lambda: call.run(hidden=hidden))
    hidden.mul_(-0.5)
    replay()
    expected = call.run(hidden=hidden)
    for a, b in zip(inside[:3], expected[:3], strict=True):  # cuBLAS may choose another GEMM
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_predictions(inside[3], expected[3], hidden, call.inputs["weight"])


def test_the_same_bits_twice() -> None:
    call = _call("small", 512)
    first, second = differentiate(call), differentiate(call)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [2, 3, 129, 1000])
def test_chunks_never_change_the_result(rows: int) -> None:
    """Chunks of one row, of some rows and of all rows differ in the order of their sums only."""
    set_logit_dtype(torch.float32)
    call = _call("small", rows)
    some = {None: differentiate(call)}
    for height in {1, -(-rows // 3)} if rows <= 129 else {300}:
        set_logit_budget(height * 6 * SHAPES["small"][1])
        some[height] = differentiate(call)
    set_logit_budget(None)
    results, gradients = some.pop(None)
    for others, other_gradients in some.values():
        for a, b in zip(others[:3], results[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        counted = results[3] >= 0
        assert_same_predictions(
            others[3][counted],
            results[3][counted],
            call.inputs["hidden"][counted],
            call.inputs["weight"],
        )
        for a, b in zip(other_gradients, gradients, strict=True):
            assert (a - b).abs().max() <= 2e-2 * b.abs().max()


@large
@pytest.mark.parametrize("rows", [4096, 16384])
def test_memory_stays_within_the_budget(rows: int) -> None:
    """Besides buffers of the shapes of W and h: 2^30 bytes of logits and a few numbers per row."""
    call = _call("qwen3_vl_2b", rows)
    differentiate(_call("small", 137))  # cuBLAS allocates its workspace
    inputs = {n: x.clone().requires_grad_() for n, x in call.inputs.items()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.run(**inputs)[0].backward()
    hidden, weight = call.inputs.values()
    # The gradients; 16,384 rows are five chunks, whose sums are fp32.
    expected = (2 if rows <= 4096 else 6) * weight.numel() + 2 * hidden.numel()
    extra = torch.cuda.max_memory_allocated() - before - expected
    assert extra <= 2**30 + 2**27
