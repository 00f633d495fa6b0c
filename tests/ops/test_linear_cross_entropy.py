"""What linear cross entropy promises beyond the contract: torch's meaning, memory, shards."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from groundkern import (
    LabelBags,
    available_backends,
    linear_cross_entropy,
    row_blocks,
)
from groundkern.ops.linear_cross_entropy import cases, reference
from tests.closeness import GRADIENTS, VALUES, assert_close
from tests.ops.test_contract import CPU, SERVED, differentiate, oracle


def _call(name: str, dtype=torch.float32):
    call = cases.CASES[name](dtype, CPU)
    return replace(call, options={**call.options, "backend": "reference"})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_means_what_torch_means(reduction: str) -> None:
    call = _call("mean_weighted_bias")
    h, w, b = call.inputs.values()
    target = call.options["target"]
    ours = linear_cross_entropy(h, w, target, bias=b, reduction=reduction)
    expected = F.cross_entropy(F.linear(h, w, b), target, reduction=reduction)
    torch.testing.assert_close(ours.loss, expected)


def test_mean_divides_by_the_counted_rows_and_not_by_their_weights() -> None:
    call = _call("mean_weighted_bias")
    summed = call.run(reduction="sum")[0]
    torch.testing.assert_close(call.run()[0], summed / 6)


def test_all_rows_ignored_is_zero_with_zero_gradients() -> None:
    (loss, *_), gradients = differentiate(_call("all_ignored"))
    assert loss == 0
    assert all(not g.any() for g in gradients)


def test_statistics_come_detached() -> None:
    call = _call("smoothed")
    results = call.run(**{n: x.requires_grad_() for n, x in call.inputs.items()})
    assert results[0].requires_grad
    assert not any(x.requires_grad for x in results[1:])


def test_the_gradient_of_a_certain_target_does_not_cancel() -> None:
    """1 - p is 1e-12 here: p - 1 in fp32 would be exactly 0."""
    weight = torch.tensor([[28.0, 0.0], [0.0, 1.0]])
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0])).loss
    loss.backward()
    tail = torch.tensor(-28.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.double(), tail, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad[0, 0].double(), -28 * tail, rtol=1e-5, atol=0)


def test_smoothing_follows_its_rules() -> None:
    """Copies of the own label leave the bag; an empty rest, no bag and b = 0 mean no smoothing."""
    call = _call("smoothed")
    h, w = call.inputs.values()
    target = call.options["target"]
    per_row = linear_cross_entropy(
        h, w, target, bags=cases.bags(CPU), smoothing=0.3, reduction="none"
    ).loss
    log_p = F.linear(h, w).log_softmax(-1)
    first = -(0.7 * log_p[0, 3] + 0.3 * (log_p[0, 5] + log_p[0, 96]) / 2)
    torch.testing.assert_close(per_row[0], first)
    for n in (3, 4, 7):  # no bag; only the own label; an empty bag
        torch.testing.assert_close(per_row[n], -log_p[n, target[n]])
    absent = -(0.7 * log_p[5, 41] + 0.3 * log_p[5, [3, 3, 5, 96, 3]].mean())
    torch.testing.assert_close(per_row[5], absent)


def test_spare_ids_behind_the_last_bag_are_never_read() -> None:
    bags = cases.bags(CPU)
    other = LabelBags(torch.where(torch.arange(11) >= 9, 50, bags.ids), bags.offsets, bags.index)
    call = _call("smoothed")
    assert torch.equal(call.run()[0], call.run(bags=other)[0])


def test_a_gradient_buffer_is_added_to() -> None:
    call = _call("smoothed")
    _, (dh, dw) = differentiate(call)
    buffer = torch.ones(97, 24)
    _, (dh_again, nothing) = differentiate(call, weight_grad=buffer)
    torch.testing.assert_close(buffer, 1 + dw)
    assert torch.equal(dh, dh_again)
    assert not nothing.any(), "dW went into the buffer and nowhere else"


@pytest.mark.parametrize("backend", [b for c, b in SERVED if c == "linear_cross_entropy/smoothed"])
def test_a_gradient_buffer_is_added_to_whatever_trains(backend: str) -> None:
    """A weight that takes no gradient itself still fills the buffer it was given."""
    call = _call("smoothed")
    _, (_, dw) = differentiate(call)
    buffer = torch.zeros(97, 24)
    differentiate(replace(call, fixed=("weight",)), weight_grad=buffer, backend=backend)
    torch.testing.assert_close(buffer, dw)


def test_a_gradient_buffer_works_when_compiled() -> None:
    call = _call("mean")
    buffer, expected = torch.zeros(97, 24), torch.zeros(97, 24)
    differentiate(call, weight_grad=expected)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    differentiate(call, compiled, weight_grad=buffer)
    torch.testing.assert_close(buffer, expected)


def test_a_frozen_head_gets_no_gradient_and_the_states_the_same() -> None:
    call = _call("everything")
    _, gradients = differentiate(call)
    frozen = replace(call, fixed=("weight", "bias"))
    _, (dh,) = differentiate(frozen)
    assert torch.equal(dh, gradients[0])


def test_log_prob_and_lse_both_carry_gradient() -> None:
    call = _call("log_prob")
    inputs = {n: x.requires_grad_() for n, x in call.inputs.items()}
    log_prob, lse, predicted = call.run(**inputs)
    (by_log_prob,) = torch.autograd.grad(log_prob.sum(), inputs["hidden"], retain_graph=True)
    (by_lse,) = torch.autograd.grad(lse.sum(), inputs["hidden"])
    assert by_log_prob.any() and by_lse.any()
    assert not by_log_prob[1].any(), "an ignored row"
    assert predicted.dtype == torch.int64


def test_logits_exist_a_block_at_a_time(monkeypatch) -> None:
    """No op of the reference makes a tensor larger than a block of logits, forward and backward."""
    call = _call("smoothed")
    expected = differentiate(call)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2 * 97)
    shapes: list[tuple[int, ...]] = []
    linear = F.linear

    def spy(*arguments):
        z = linear(*arguments)
        shapes.append(tuple(z.shape))
        return z

    monkeypatch.setattr(F, "linear", spy)
    got = differentiate(call)
    assert shapes == [(2, 97)] * 6, "three blocks of two counted rows, forward and backward"
    for a, b in zip((*expected[0], *expected[1]), (*got[0], *got[1]), strict=True):
        torch.testing.assert_close(a, b)


NATIVE_KERNELS = "groundkern.ops.linear_cross_entropy.native_kernels"
NATIVE = available_backends()["native"]
needs_native = pytest.mark.skipif(NATIVE is not None, reason=NATIVE or "")


@needs_native
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("fixed", [(), ("weight", "bias"), ("bias",), ("weight",), ("hidden",)])
def test_gradients_made_in_the_forward(reduction: str, fixed: tuple, compiled: bool) -> None:
    """Whatever is trained and however rows are reduced, native agrees with the reference."""
    call = replace(_call("everything"), fixed=fixed)
    call = replace(call, options={**call.options, "reduction": reduction})
    expected = differentiate(call)
    torch._dynamo.reset()
    function = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = differentiate(call, function if compiled else None, backend="native")
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@needs_native
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_a_second_backward_makes_the_gradients_again(factor: float) -> None:
    call = _call("smoothed")
    inputs = {n: x.clone().requires_grad_() for n, x in call.inputs.items()}
    loss = call.run(**inputs, backend="native")[0] * factor
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs.values()]
    for x in inputs.values():
        x.grad.add_(1.0)  # a returned gradient is the caller's
        x.grad = None
    loss.backward()
    for x, grad in zip(inputs.values(), once, strict=True):
        torch.testing.assert_close(x.grad, grad)


@needs_native
def test_a_second_derivative_is_refused() -> None:
    call = _call("mean")
    hidden = call.inputs["hidden"].clone().requires_grad_()
    loss = call.run(hidden=hidden, backend="native")[0]
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@needs_native
def test_native_chunks_and_buffers_change_nothing(monkeypatch) -> None:
    """One, two and six chunks; into a buffer and returned."""
    call = _call("smoothed")
    expected = differentiate(call)
    for rows in (1, 4, 6):
        monkeypatch.setattr(f"{NATIVE_KERNELS}.LOGIT_BYTES", rows * 97 * 4)
        got = differentiate(call, backend="native")
        buffer = torch.ones(97, 24)
        _, (dh, nothing) = differentiate(call, backend="native", weight_grad=buffer)
        assert not nothing.any()
        for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dh, expected[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(buffer, 1 + expected[1][1], rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mean_weighted_bias", "smoothed", "everything", "softcap"])
@pytest.mark.parametrize("rows", [3, 1000])
def test_native_with_the_products_of_torch(name: str, dtype, rows: int, monkeypatch) -> None:
    """As on a CPU whose matrix products torch's library makes faster; in chunks, and kept."""
    monkeypatch.setattr("groundkern.native.multiplies", lambda dtype: False)
    monkeypatch.setattr(f"{NATIVE_KERNELS}.LOGIT_BYTES", rows * 97 * dtype.itemsize)
    call = cases.CASES[name](dtype, CPU)
    truth, true_gradients = oracle(call, torch.float64)
    naive, naive_gradients = oracle(call, dtype)
    buffer = torch.ones(97, 24)
    for options in ({}, {"weight_grad": buffer}):
        got, gradients = differentiate(call, backend="native", **options)
        if options:
            gradients[1] = (buffer - 1).to(dtype)
        for a, b, c in zip(got[:3], naive[:3], truth[:3], strict=True):
            assert_close("result", a, b, c, VALUES)
        for a, b, c in zip(gradients, naive_gradients, true_gradients, strict=True):
            assert_close("gradient", a, b, c, GRADIENTS)


@needs_native
def test_kept_logits_serve_every_backward() -> None:
    """Per-row losses of a trained head: two gradients, by another upstream each, and the same bits
    as a call of their own."""
    call = _call("smoothed")
    options = {"reduction": "none", "backend": "native"}
    inputs = {n: x.clone().requires_grad_() for n, x in call.inputs.items()}
    loss = call.run(**inputs, **options)[0]
    for seed in (1, 2, 1):
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed))
        kept = torch.autograd.grad(loss, inputs.values(), upstream, retain_graph=True)
        alone = torch.autograd.grad(call.run(**inputs, **options)[0], inputs.values(), upstream)
        assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))


SHARDS = [40, 1, 56]  # of a vocabulary of 97: uneven on purpose, labels and lists on all of them
SHARDED = ("everything", "all_at_once", "soft_all_at_once", "entropy", "one_of_each_shard")


def _sharded_call(name: str, dtype: torch.dtype):
    if name != "one_of_each_shard":
        return cases.CASES[name](dtype, CPU)
    target = torch.tensor([0, 39, 40, 41, 96, -100, 40, 1])  # the ends of each shard
    call = cases.call(dtype, CPU, label_smoothing=0.2, top_k=3, reduction="none")
    return replace(call, options={**call.options, "target": target})


def _one_rank(rank: int, store: str, dtype: torch.dtype, backend: str, results) -> None:
    torch.set_num_threads(1)
    row_blocks.LOGIT_BYTES = 4 * 3 * max(SHARDS)  # the smaller shards would fit more rows
    world = len(SHARDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    first = sum(SHARDS[:rank])
    shard = slice(first, first + SHARDS[rank])
    for name in SHARDED:
        call = _sharded_call(name, dtype)
        inputs = {n: x if n == "hidden" else x[shard].clone() for n, x in call.inputs.items()}
        options = {**call.options, "group": dist.group.WORLD, "backend": backend}
        outputs, gradients = differentiate(replace(call, inputs=inputs, options=options))
        results[name, rank] = [x.detach() for x in (*outputs, *gradients)]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        pytest.param("triton", torch.float32, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_sharded_vocabulary_equals_one_process(backend: str, dtype, tmp_path) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    with mp.Manager() as manager:
        shared = manager.dict()
        arguments = (str(tmp_path / "store"), dtype, backend, shared)
        mp.spawn(_one_rank, arguments, nprocs=len(SHARDS))
        results = dict(shared)
    for name in SHARDED:
        call = _sharded_call(name, dtype)
        call = replace(call, options={**call.options, "backend": "reference"})
        outputs, (dh, *parameters) = differentiate(call)
        parts = [x.split(SHARDS) for x in parameters]
        for rank in range(len(SHARDS)):
            expected = [*outputs, dh, *(part[rank] for part in parts)]
            for a, b in zip(results[name, rank], expected, strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, n=name, r=rank: f"{n} {r}: {m}")


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_bags_without_any_label_smooth_nothing(backend: str) -> None:
    """Not one id in any bag, also under a softcap: torch gives such a tensor no memory."""
    if available_backends()[backend] is not None:
        pytest.skip(available_backends()[backend])
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
    target, none = torch.tensor([1, 5, 10, 0]), torch.zeros(0, dtype=torch.int64)
    bags = LabelBags(none, torch.tensor([0, 0]), torch.zeros(4, dtype=torch.int64))
    for softcap in (None, 5.0):
        options = {"softcap": softcap, "backend": backend}
        plain = linear_cross_entropy(hidden, weight, target, **options)
        bagged = linear_cross_entropy(hidden, weight, target, bags=bags, smoothing=0.3, **options)
        torch.testing.assert_close(bagged.loss, plain.loss, rtol=0, atol=0)
