"""Triton linear cross entropy on a GPU, at the sizes people train: needs a CUDA device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundkern import LabelBags, linear_cross_entropy
from groundkern.ops.cases import Call
from groundkern.ops.linear_cross_entropy import cases
from tests.closeness import GRADIENTS, VALUES, assert_close
from tests.ops import naive
from tests.ops.test_contract import differentiate

pytestmark = pytest.mark.gpu

SHAPES = {"qwen3_vl_2b": (2048, 151936), "qwen2_5_vl_7b": (3584, 152064)}  # D, V
# 137 and 512 rows are memory-bound and fit one chunk; 1024 in the backward fits just so.
ROWS = (137, 512, 1024)
CUDA = torch.device("cuda")
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_rows = pytest.mark.parametrize("rows", ROWS)


def _call(shape: str, rows: int, dtype=torch.bfloat16, **options) -> Call:
    """Some rows ignored, half of the rest smoothed over two images' labels (one id repeated)."""
    dim, vocabulary = SHAPES[shape]
    draw = torch.Generator(CUDA).manual_seed(rows)
    hidden = torch.randn(rows, dim, device=CUDA, generator=draw).to(dtype)
    weight = (torch.randn(vocabulary, dim, device=CUDA, generator=draw) * dim**-0.5).to(dtype)
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


def _hold(ours: tuple, plain: tuple, truth: tuple, factor: float) -> None:
    for i, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        p, t = p.to(o.device), t.to(o.device)  # naive makes its statistics on the host
        if o.is_floating_point():
            assert_close(f"{i}", o, p, t, factor)
        else:
            assert torch.equal(o[p == t], t[p == t])


@each_shape
@each_rows
def test_values_and_gradients(shape: str, rows: int) -> None:
    call = _call(shape, rows)
    ours, gradients = differentiate(call)
    plain, plain_gradients = _plain(call, torch.bfloat16)
    truth, true_gradients = _plain(call, torch.float64)
    _hold(ours, plain, truth, VALUES)
    _hold(tuple(gradients), tuple(plain_gradients), tuple(true_gradients), GRADIENTS)


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract_cases(case: str, dtype: torch.dtype) -> None:
    call = cases.CASES[case](dtype, CUDA)
    plain = replace(call, options={k: x for k, x in call.options.items() if k != "backend"})
    function = getattr(naive, call.function.__name__)
    ours, gradients = differentiate(call, backend="triton")
    expected, expected_gradients = differentiate(plain, function, dtype)
    truth, true_gradients = differentiate(plain, function, torch.float64)
    _hold(ours, expected, truth, VALUES)
    _hold(tuple(gradients), tuple(expected_gradients), tuple(true_gradients), GRADIENTS)


@pytest.mark.parametrize("trained", [True, False])
def test_the_host_never_waits(trained: bool) -> None:
    call = _call("qwen3_vl_2b", 137)
    call = replace(call, fixed=() if trained else ("weight",))
    differentiate(call)  # compiles
    torch.cuda.synchronize()
    inputs = {n: x.clone().requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(**inputs)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_forward_is_captured_in_a_graph() -> None:
    call = _call("qwen3_vl_2b", 137, reduction="none")
    hidden = call.inputs["hidden"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run(hidden=hidden)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run(hidden=hidden)
    hidden.mul_(-0.5)
    graph.replay()
    for a, b in zip(captured, call.run(hidden=hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_twice() -> None:
    call = _call("qwen2_5_vl_7b", 512)
    first, second = differentiate(call), differentiate(call)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [4096, 16384])
def test_memory_stays_within_the_budget(rows: int) -> None:
    """Beyond W-shaped and h-shaped buffers: 2^30 bytes of logits and a few numbers per row."""
    call = _call("qwen3_vl_2b", rows)
    inputs = {n: x.clone().requires_grad_() for n, x in call.inputs.items()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.run(**inputs)[0].backward()
    hidden, weight = call.inputs.values()
    expected = 6 * weight.numel() + 6 * hidden.numel()  # fp32 sums and the gradients they become
    extra = torch.cuda.max_memory_allocated() - before - expected
    assert extra <= 2**30 + 2**27
