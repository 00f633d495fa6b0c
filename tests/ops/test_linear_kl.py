"""What linear KL promises beyond the contract: torch's meaning, a constant teacher, chunks, shards,
and digits that survive where both heads are certain or agree."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from groundkern import available_backends, linear_kl, row_blocks, set_logit_budget
from groundkern.ops.linear_kl import cases, reference
from tests.ops.test_contract import CPU, differentiate

BACKENDS = [name for name, why in available_backends().items() if why is None]
FAST = [name for name in BACKENDS if name != "reference"]
KINDS = ("forward", "reverse", "js")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast = pytest.mark.parametrize("backend", FAST)
each_kind = pytest.mark.parametrize("kind", KINDS)


def _call(name: str, backend: str = "reference", dtype=torch.float32, **options):
    call = cases.CASES[name](dtype, CPU)
    return replace(call, options={**call.options, "backend": backend, **options})


def _same(got: tuple, expected: tuple, tolerance: float = 2e-5) -> None:
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_means_what_torch_means(reduction: str) -> None:
    call = _call("forward")
    h, w, th, tw = call.inputs.values()
    s, t = (F.linear(*x).div(2.0).log_softmax(-1) for x in ((h, w), (th, tw)))
    for kind, (p, q) in {"forward": (t, s), "reverse": (s, t)}.items():
        ours = call.run(kind=kind, temperature=2.0, reduction=reduction)[0]
        terms = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        expected = {"none": terms, "sum": terms.sum(), "mean": terms.mean()}[reduction]
        torch.testing.assert_close(ours, expected)


def test_mean_divides_by_the_counted_rows_and_not_by_their_weights() -> None:
    call = _call("everything")
    rows = call.run()[0]
    torch.testing.assert_close(call.run(reduction="mean")[0], rows.sum() / 5)
    assert not rows[[1, 4]].any(), "rows that do not count"


def test_js_tends_to_the_kls() -> None:
    """js / (1 - beta) as beta -> 1 is the reverse KL, js / beta as beta -> 0 the forward one."""
    call = _call("forward", dtype=torch.float64, temperature=10.0)
    for kind, beta, share in (("reverse", 1 - 1e-9, 1e-9), ("forward", 1e-9, 1e-9)):
        js = call.run(kind="js", beta=beta)[0] / share
        torch.testing.assert_close(js, call.run(kind=kind)[0], rtol=1e-5, atol=0)


@each_backend
@each_kind
def test_the_teacher_is_a_constant(backend: str, kind: str) -> None:
    """Also where it reads the student's own parameter, at other states."""
    call = _call("forward", backend, kind=kind)
    hidden, weight = (call.inputs[n].clone().requires_grad_() for n in ("hidden", "weight"))
    states = hidden.detach().flip(0).requires_grad_()
    loss = linear_kl(hidden, weight, states, weight, kind=kind, backend=backend)
    loss.backward()
    assert states.grad is None
    got = [x.grad.clone() for x in (hidden, weight)]
    hidden.grad = weight.grad = None
    other = weight.detach().clone()
    linear_kl(hidden, weight, states, other, kind=kind, backend=backend).backward()
    torch.testing.assert_close(got, [hidden.grad, weight.grad], rtol=0, atol=0)


@each_backend
@each_kind
def test_identical_heads_are_at_zero(backend: str, kind: str) -> None:
    loss, gradients = differentiate(_call("identical", backend, kind=kind))
    assert not loss[0].any()
    assert all(g.abs().max() < 1e-6 for g in gradients)


@each_backend
@each_kind
def test_certain_heads_keep_their_digits(backend: str, kind: str) -> None:
    """1 - s is 1e-12 and 1 - t 1e-10 here: s - t in fp32 would be exactly 0."""
    weight = torch.tensor([[28.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[23.0, 0.0], [0.0, 1.0]])
    found = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        hidden = torch.tensor([[1.0, 0.0]], dtype=dtype, requires_grad=True)
        states = hidden.detach()
        heads = hidden, weight.to(dtype), states, teacher.to(dtype)
        loss = linear_kl(*heads, kind=kind, beta=0.3, backend=name)
        loss.backward()
        found.append([loss.detach().double(), hidden.grad.double()])
    torch.testing.assert_close(*found, rtol=2e-4, atol=0)
    assert found[1][1][0, 0] != 0


@each_fast
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("fixed", [(), ("weight", "bias"), ("bias",), ("weight",), ("hidden",)])
def test_gradients_made_in_the_forward(backend, reduction, fixed, compiled) -> None:
    """Whatever is trained and however rows are reduced, a backend agrees with the reference."""
    if compiled and (backend, fixed) not in {("triton", ()), ("native", ("weight", "bias"))}:
        pytest.skip("compiled once in either way")
    if backend == "triton" and len(fixed) == 1:
        pytest.skip("Triton's interpreter is slow")
    call = _call("everything", reduction=reduction)
    call = replace(call, fixed=(*cases.TEACHER, *fixed))
    expected = differentiate(call)
    torch._dynamo.reset()
    function = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
    _same(differentiate(call, function if compiled else None, backend=backend), expected)


@each_fast
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_a_second_backward_makes_the_gradients_again(backend: str, factor: float) -> None:
    call = _call("forward", backend)
    names = ("hidden", "weight")
    inputs = {n: call.inputs[n].clone().requires_grad_() for n in names}
    loss = call.run(**inputs)[0] * factor
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs.values()]
    for x in inputs.values():
        x.grad.add_(1.0)  # a returned gradient is the caller's
        x.grad = None
    loss.backward()
    torch.testing.assert_close([x.grad for x in inputs.values()], once)


@each_fast
def test_a_second_derivative_is_refused(backend: str) -> None:
    call = _call("forward", backend)
    hidden = call.inputs["hidden"].clone().requires_grad_()
    loss = call.run(hidden=hidden)[0]
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@each_fast
@pytest.mark.parametrize("name", ["everything", "forward"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_budget_changes_chunks_and_no_result(backend, name, rows, monkeypatch) -> None:
    call = _call(name)
    expected = differentiate(call)
    heights = []
    leaf = {"native": "native_kernels", "triton": "triton_launch"}[backend]

    def counted(*arguments) -> list[slice]:
        chunks = row_blocks.logit_chunks(*arguments)
        heights.extend(c.stop - c.start for c in chunks)
        return chunks

    monkeypatch.setattr(f"groundkern.ops.linear_kl.{leaf}.logit_chunks", counted)
    budget = 97 * 12 * rows
    set_logit_budget(budget)
    try:
        _same(differentiate(call, backend=backend), expected)
    finally:
        set_logit_budget(None)
    assert len(heights) > 1 and max(heights) * 97 * 8 <= budget


def test_the_reference_holds_a_block_of_logits_at_a_time(monkeypatch) -> None:
    call = _call("everything")
    expected = differentiate(call)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2 * 97)
    shapes = []
    linear = F.linear

    def spy(*arguments):
        z = linear(*arguments)
        shapes.append(tuple(z.shape))
        return z

    monkeypatch.setattr(F, "linear", spy)
    _same(differentiate(call), expected)
    assert set(shapes) == {(2, 97), (1, 97)}, "five counted rows"


def test_native_works_on_a_few_rows_at_a_time(monkeypatch) -> None:
    if "native" not in BACKENDS:
        pytest.skip(available_backends()["native"])
    expected = differentiate(_call("everything"))
    monkeypatch.setattr("groundkern.ops.linear_kl.native_kernels.CACHED", 2 * 97)
    _same(differentiate(_call("everything", "native")), expected)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the triton package")
@pytest.mark.parametrize("name", ["everything", "everything_forward", "certain_reverse", "one_row"])
def test_triton_steps_along_a_row(name: str, monkeypatch) -> None:
    """The likeliest entry may lie in any step; the last one is not full."""
    from groundkern.ops.linear_kl.op import kernels

    launch = kernels("triton")
    expected = differentiate(_call(name))
    monkeypatch.setattr(launch, "TILES", launch.Tiles(columns=16, warps=4))
    _same(differentiate(_call(name, "triton")), expected)


@each_backend
def test_nan_reaches_its_row_and_no_other(backend: str) -> None:
    """Of a row that does not count not even the weight's gradient."""
    for name in ("hidden", "teacher_hidden"):
        for row, seen in ((0, True), (1, False)):
            call = _call("everything", backend)
            x = call.inputs[name].clone()
            x[row, 0] = torch.nan
            (loss,), gradients = differentiate(replace(call, inputs={**call.inputs, name: x}))
            assert loss.isnan().tolist() == [seen and n == row for n in range(7)]
            assert all(g.isnan().any() == seen for g in gradients)


@each_backend
def test_autocast_lets_states_meet_heads_of_other_dtypes(backend: str) -> None:
    call = _call("forward", backend)
    mixed = {"hidden": call.inputs["hidden"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert call.run(**mixed)[0].dtype == torch.float32
    with pytest.raises(TypeError, match=r"`weight`: expected torch\.bfloat16, got torch\.float32"):
        call.run(**mixed)


def test_what_is_refused() -> None:
    if "triton" in BACKENDS:
        with pytest.raises(ValueError, match="the kernels sum in fp32"):
            _call("forward", "triton", torch.float64).run()
    program = """
import torch, groundkern
x = torch.ones(1, 4)
try:
    groundkern.linear_kl(x, x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "only under TRITON_INTERPRET=1" in result.stdout or "triton" not in BACKENDS


SHARDS = [40, 57]  # of a vocabulary of 97: uneven on purpose
SHARDED = {
    "reference": (
        "everything",
        "everything_forward",
        "everything_reverse",
        "certain_js",
        "forward",
    ),
    "triton": ("everything", "everything_reverse", "forward"),
}
HEADS = ("weight", "bias", "teacher_weight", "teacher_bias")


def _one_rank(rank: int, store: str, found) -> None:
    torch.set_num_threads(1)
    row_blocks.LOGIT_BYTES = 12 * 3 * max(SHARDS)  # the smaller shard would fit four rows
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shard = slice(sum(SHARDS[:rank]), sum(SHARDS[: rank + 1]))
    results = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        for name in SHARDED[backend] if backend in BACKENDS else ():
            call = _call(name, backend, dtype, group=dist.group.WORLD)
            inputs = {n: x[shard].clone() if n in HEADS else x for n, x in call.inputs.items()}
            call = replace(call, inputs=inputs)
            if name == "forward":
                call = replace(call, fixed=(*cases.TEACHER, "weight"))
            (loss,), gradients = differentiate(call)
            results[backend, name] = [loss.detach(), *gradients]
    if "native" in BACKENDS:
        with pytest.raises(ValueError, match="do not shard the vocabulary over a process group"):
            _call("forward", "native", group=dist.group.WORLD).run()
    found[rank] = results
    dist.destroy_process_group()


@pytest.mark.long
def test_a_sharded_vocabulary_equals_one_process(tmp_path) -> None:
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(_one_rank, (str(tmp_path / "store"), found), nprocs=2)
        ranks = [found[0], found[1]]
    assert len(ranks[0]) == sum(len(SHARDED[x]) for x in SHARDED if x in BACKENDS)
    for backend, name in ranks[0]:
        dtype = torch.float64 if backend == "reference" else torch.float32
        (loss,), (dh, *of_head) = differentiate(_call(name, dtype=dtype))
        for rank, got in enumerate(x[backend, name] for x in ranks):
            parts = [x.split(SHARDS)[rank] for x in of_head] if name != "forward" else []
            torch.testing.assert_close(got, [loss, dh, *parts])
        assert torch.equal(ranks[0][backend, name][0], ranks[1][backend, name][0])
