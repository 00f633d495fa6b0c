"""What the Triton kernels promise beyond the contract: chunks, spans, bad labels, refusals."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from groundkern import (
    LabelBags,
    available_backends,
    head_gradients,
    linear_cross_entropy,
    row_blocks,
    set_logit_dtype,
)
from groundkern.ops import linear_cross_entropy as ce
from groundkern.ops.linear_cross_entropy import cases
from groundkern.row_blocks import logit_chunks
from tests.closeness import GRADIENTS, assert_close
from tests.ops import naive
from tests.ops.test_contract import CPU, differentiate, hold, oracle

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason="needs the triton package"
)


def _call(name: str, backend: str = "triton", dtype=torch.float32):
    call = cases.CASES[name](dtype, CPU)
    return replace(call, options={**call.options, "backend": backend})


@pytest.mark.parametrize("rows", [0, 1, 137, 512, 1024, 16384])
@pytest.mark.parametrize("vocabulary", [97, 151936])
@pytest.mark.parametrize("width", [4, 6])
def test_chunks_cover_the_rows_within_the_budget(rows: int, vocabulary: int, width: int) -> None:
    chunks = logit_chunks(rows, vocabulary, width)
    assert [n for c in chunks for n in range(rows)[c]] == list(range(rows))
    heights = [c.stop - c.start for c in chunks]
    assert all(h * vocabulary * width <= row_blocks.LOGIT_BYTES for h in heights)
    assert len(set(heights[:-1])) <= 1, "all but the last are equal"
    if rows * vocabulary * width <= row_blocks.LOGIT_BYTES:
        assert len(chunks) <= 1


def test_a_row_beyond_the_budget_is_a_chunk_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "LOGIT_BYTES", 10)
    assert logit_chunks(2, 97, 4) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("case", ["everything", "smoothed", "mean_weighted_bias"])
def test_chunks_give_what_one_chunk_gives(case: str, monkeypatch) -> None:
    call = _call(case)
    vocabulary, dim = 1900, 4
    weight = torch.randn(vocabulary, dim)
    inputs = {**call.inputs, "weight": weight, "hidden": torch.randn(8, dim)}
    if "bias" in inputs:
        inputs["bias"] = torch.randn(vocabulary)
    call = replace(call, inputs=inputs)
    expected = differentiate(call)
    monkeypatch.setattr(row_blocks, "LOGIT_BYTES", 3 * 4 * vocabulary)
    heights = []
    mm = torch.mm

    def spy(a, b, *, out):
        if out.shape[1] == vocabulary:
            heights.append(out.shape[0])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    got = differentiate(call)
    # Gradients take their logits' place. Per-row losses of a trained head are computed twice.
    assert heights == [3, 3, 2] * (2 if call.options.get("reduction") == "none" else 1)
    for a, b in zip((*expected[0], *expected[1]), (*got[0], *got[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_gradient_buffer_is_added_to(chunked: bool, monkeypatch) -> None:
    call = _call("smoothed")
    _, (dh, dw) = differentiate(call)
    if chunked:
        monkeypatch.setattr(row_blocks, "LOGIT_BYTES", 2 * 8 * 97)
    buffer = torch.ones(97, 24)
    _, (dh_again, nothing) = differentiate(call, weight_grad=buffer)
    torch.testing.assert_close(buffer, 1 + dw)
    torch.testing.assert_close(dh_again, dh)
    assert not nothing.any()


def test_a_frozen_head_gets_no_gradient_and_the_states_the_same() -> None:
    call = _call("everything")
    _, gradients = differentiate(call)
    _, (dh,) = differentiate(replace(call, fixed=("weight", "bias")))
    torch.testing.assert_close(dh, gradients[0])  # scaled after the product, not before


def test_a_vocabulary_of_several_spans() -> None:
    """Labels, bags and the likeliest id in every span; the last span is one entry wide."""
    vocabulary, dim = 2 * 8192 + 1, 8
    target = torch.tensor([0, 8191, 8192, 16383, 16384, -100])
    hidden = torch.randn(6, dim)
    weight = torch.randn(vocabulary, dim) * 0.3
    weight[[5, 8200, 16384]] = 3 * torch.nn.functional.normalize(hidden[:3])
    ids = torch.tensor([16384, 1, 8192, 8192, 300, 16384])
    bags = LabelBags(ids, torch.tensor([0, 6]), torch.tensor([0, -1, 0, 0, 0, 0]))
    call = replace(
        _call("mean"),
        inputs={"hidden": hidden, "weight": weight},
        options={"target": target, "bags": bags, "smoothing": 0.3, "reduction": "none"},
    )
    ours, our_gradients = differentiate(call, backend="triton")
    truth, true_gradients = differentiate(call, backend="reference")
    for a, b in zip((*ours, *our_gradients), (*truth, *true_gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_equal_logits_predict_the_smallest_id() -> None:
    hidden, weight = torch.zeros(1, 4), torch.randn(2 * 8192, 4)
    target = torch.tensor([9000])
    assert linear_cross_entropy(hidden, weight, target, backend="triton").predicted.item() == 0


def test_no_bag_at_all() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    bags = LabelBags(nothing, torch.zeros(1, dtype=torch.int64), torch.full((8,), -1))
    expected, gradients = differentiate(_call("mean"))
    got, got_gradients = differentiate(_call("mean"), bags=bags, smoothing=0.3)
    for a, b in zip((*expected, *gradients), (*got, *got_gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("label", [-1, 97, 2**40, -(2**40)])
def test_a_label_out_of_range_reads_nothing_and_shows(label: int) -> None:
    """On a GPU nothing checks labels: the row's loss is inf, and the others are unchanged."""
    call = _call("mean")
    target = call.options["target"].clone()
    target[2] = label
    ids, offsets = torch.tensor([label, 5]), torch.tensor([0, 2])
    lists = ids, None, offsets, torch.zeros(8, dtype=torch.int64)
    labels = ce.Labels(target, None, *lists, None)
    run = torch.ops.groundkern.linear_cross_entropy
    hidden, weight = (x.clone().requires_grad_() for x in call.inputs.values())

    def losses(smoothing: float) -> torch.Tensor:
        options = ce.Options(smoothing, 0.0, 0.0, 0.0, 1.0, -100, "", False, 0)
        given = labels if smoothing else ce.Labels(target, *[None] * 6)
        return run(hidden, weight, None, *given, *options, None, False, "triton")[0]

    loss = losses(0.0)
    assert loss[2] == torch.inf
    expected = call.run(reduction="none")[0]
    others = torch.arange(8) != 2
    torch.testing.assert_close(loss[others], expected[others])
    loss.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert losses(0.3)[others].isfinite().all()


def test_a_nan_reaches_the_loss() -> None:
    call = _call("mean")
    hidden = call.inputs["hidden"].clone()
    hidden[0, 0] = torch.nan
    results = call.run(hidden=hidden, reduction="none")
    assert results[0].isnan().tolist() == [True] + [False] * 7


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match="the kernels sum in fp32"):
        _call("mean", dtype=torch.float64).run()


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    program = """
import torch, groundkern
x = torch.ones(1, 4)
try:
    groundkern.linear_cross_entropy(x, x, torch.zeros(1, dtype=torch.int64), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "only under TRITON_INTERPRET=1" in result.stdout


@pytest.mark.parametrize("case", ["everything", "soft_all_at_once"])
def test_fp32_logits_of_16_bit_operands(case: str, monkeypatch) -> None:
    """Nearer to the truth than logits of 16 bits, the gradient in memory of its own."""
    call = _call(case, dtype=torch.bfloat16)
    truth, _ = oracle(call, torch.float64)
    narrow = differentiate(call)[0]
    shapes = []
    plain = row_blocks.logit_chunks
    module = "groundkern.ops.linear_cross_entropy.triton_launch.logit_chunks"
    monkeypatch.setattr(module, lambda *x, **y: shapes.append(x) or plain(*x, **y))
    set_logit_dtype(torch.float32)
    try:
        results, gradients = differentiate(call)
        hold(call, "triton", torch.bfloat16)
    finally:
        set_logit_dtype(None)
    assert shapes[0][2] == (4 if call.options["reduction"] == "none" else 6), "bytes of a logit"
    lse = [float((x[2].double() - truth[2]).abs().max()) for x in (results, narrow)]
    assert lse[0] < 0.02 * lse[1]
    assert all(g.dtype == torch.bfloat16 for g in gradients)


def test_logits_come_in_the_operands_dtype_or_fp32() -> None:
    with pytest.raises(ValueError, match=r"`dtype`: expected torch\.float32 or None"):
        set_logit_dtype(torch.float16)


@pytest.mark.parametrize("chunks", [1, 4, 5])
def test_a_gradient_of_some_chunks_is_summed_in_its_dtype(chunks: int, monkeypatch) -> None:
    """Up to four; of more the sum is fp32. Either way within the rule."""
    rows, vocabulary, dim = 40, 97, 24
    hidden, weight = torch.randn(rows, dim).bfloat16(), torch.randn(vocabulary, dim).bfloat16()
    target = torch.randint(vocabulary, (rows,))
    options = {"target": target, "row_weight": torch.randn(rows), "reduction": "sum"}
    call = replace(_call("mean"), inputs={"hidden": hidden, "weight": weight}, options=options)
    monkeypatch.setattr(row_blocks, "LOGIT_BYTES", 2 * vocabulary * (rows // chunks))
    sums, plain = [], head_gradients.matmul

    def spy(a, b, out, *, add=False):
        if out.shape == weight.shape:
            sums.append(out.dtype)
        plain(a, b, out=out, add=add)

    monkeypatch.setattr(head_gradients, "matmul", spy)
    hold(call, "triton", torch.bfloat16)
    assert sums == [torch.bfloat16 if chunks <= 4 else torch.float32] * chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_a_second_backward_makes_the_gradients_again(factor: float, dtype) -> None:
    """The first scales those of the forward where they are; both are within the rule."""

    def gradients(function, dtype, times: int = 1, **options) -> list[tuple[torch.Tensor, ...]]:
        inputs = {n: x.to(dtype).requires_grad_() for n, x in call.inputs.items()}
        loss = function(**inputs, **options)[0] * factor
        leaves = list(inputs.values())
        return [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(times)]

    call = _call("smoothed", dtype=dtype)
    plain = {n: x for n, x in call.options.items() if n != "backend"}
    (truth,) = gradients(naive.linear_cross_entropy, torch.float64, **plain)
    (near,) = gradients(naive.linear_cross_entropy, dtype, **plain)
    for ours in gradients(linear_cross_entropy, dtype, 2, **call.options):
        for name, *of_input in zip(call.inputs, ours, near, truth, strict=True):
            assert_close(f"d{name}", *of_input, GRADIENTS)
