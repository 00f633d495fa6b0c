"""A plain eager call reaches the kernels without torch's dispatcher, by what was found in the layer
before. It must do what the op does, on every input."""

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groundkern import (
    KeySets,
    QueryRows,
    available_backends,
    calls,
    side_attention,
    together,
)
from groundkern.kept import nothing_kept
from groundkern.ops.attention_map import cases as attention_map_cases
from groundkern.ops.attention_map import op as attention_map_op
from groundkern.ops.cases import Call, randn
from groundkern.ops.side_attention import cases as side_attention_cases
from groundkern.ops.side_attention import op as side_attention_op

CASES = {
    f"{op}/{name}": make
    for op, module in (
        ("side_attention", side_attention_cases),
        ("attention_map", attention_map_cases),
    )
    for name, make in module.CASES.items()
}
OPS = {"side_attention": side_attention_op, "attention_map": attention_map_op}
SOME = ("side_attention/regions", "attention_map/kl_columns_mean", "attention_map/kl_visible_mean")
BACKENDS = [name for name, why in available_backends().items() if why is None]
CPU = torch.device("cpu")
each_case = pytest.mark.parametrize("case", CASES)
each_of_some = pytest.mark.parametrize("case", SOME)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Watching(TorchDispatchMode):
    """Sends calls through the dispatcher, and notes our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "groundkern":
            self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def run(call: Call, within=None) -> list[Tensor]:
    """Results and gradients of a call, for upstream gradients that are not all alike."""
    inputs = {n: x if n in call.fixed else leaf(x) for n, x in call.inputs.items()}
    with within or nullcontext():
        results = call.run(**inputs)[: call.differentiable]
    upstream = [randn(7 + i, *x.shape, dtype=x.dtype, device=CPU) for i, x in enumerate(results)]
    with within or nullcontext():
        torch.autograd.backward(results, upstream)
    return [*results, *(x.grad for x in inputs.values() if x.grad is not None)]


def make(case: str, backend: str, dtype: torch.dtype = torch.float32) -> Call:
    call = CASES[case](dtype, CPU)
    return replace(call, options={**call.options, "backend": backend})


@each_backend
@each_case
def test_the_bits_of_the_op(case: str, backend: str) -> None:
    """The second call uses what the first one found."""
    if backend == "triton" and case not in SOME:
        pytest.skip("the interpreter is slow: it runs three cases")
    call, watching = make(case, backend), Watching()
    wanted = run(call, watching)
    op = f"groundkern::{case.split('/')[0]}"
    assert {op, f"{op}_backward"} <= set(watching.ops), "the other side of the comparison"
    for _ in range(2):
        for got, x in zip(run(call), wanted, strict=True):
            assert torch.equal(got.nan_to_num(), x.nan_to_num())


@each_of_some
def test_no_dispatcher(case: str) -> None:
    op = OPS[case.split("/")[0]]
    name = case.split("/")[0]
    with mock.patch.object(op, name, None), mock.patch.object(op, f"{name}_backward", None):
        run(make(case, "reference"))


@each_of_some
def test_found_once(case: str) -> None:
    """In every layer: other tensors, the same selection."""
    call, op = make(case, "reference"), OPS[case.split("/")[0]]
    with mock.patch.object(op, "call", wraps=op.call) as found:
        for seed in range(3):
            run(replace(call, inputs=_others(call.inputs, seed)))
        assert found.call_count == 1
        with nothing_kept():
            run(call)
        assert found.call_count == 2


def _others(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Other tensors of the same signatures; what a selection is kept with stays."""
    return {n: x if n == "target" else x.clone().mul_(1 + 0.1 * seed) for n, x in inputs.items()}


@each_of_some
def test_calls_of_other_steps_are_launched_alike(case: str) -> None:
    """Calls that differ in the numbers of their tensors alone share what their launches follow
    from, which keeps none of these tensors; and so does a call of compiled code."""
    if "triton" not in BACKENDS:
        pytest.skip(f"triton: {available_backends()['triton']}")
    call, launches = (
        make(case, "triton"),
        importlib.import_module(f"groundkern.ops.{case.split('/')[0]}.triton_launch"),
    )
    rows = call.options["rows"]
    earlier = replace(rows, stop=torch.maximum(rows.stop - 1, rows.start))
    call = replace(call, options={**call.options, "rows": earlier})
    run(call), run(call, Watching())  # compiled code has outputs written whole: another kind
    with mock.patch.object(launches, "_Launch", wraps=launches._Launch) as made:
        step = replace(
            call, options={**call.options, "rows": replace(rows, stop=rows.stop.clone())}
        )
        found, compiled = run(step), run(step, Watching())
        assert made.call_count == 0
        with nothing_kept():
            wanted = run(step)
        assert made.call_count > 0
    for results in (found, compiled):
        for got, x in zip(results, wanted, strict=True):
            assert torch.equal(got.nan_to_num(), x.nan_to_num())
    kept = weakref.ref(step.options["rows"].stop)
    del made, step, found, compiled, wanted, results, got, x
    gc.collect()
    assert kept() is None


def test_what_differs_is_found_anew() -> None:
    """Sizes, strides, alignment, dtypes and options are not mistaken for one another."""
    call = make("side_attention/causal", "reference")
    q, k, v = (call.inputs[n] for n in "qkv")
    off = torch.zeros(q.numel() + 1)[1:].view(q.shape).copy_(q)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = call.run()
    with mock.patch.object(side_attention_op, "call", wraps=side_attention_op.call) as found:
        for changed in (
            {"q": off},
            {"k": strided},
            {"scale": 0.5},
            {"softcap": 3.0},
            {"backend": "auto"},
            {n: x.bfloat16() for n, x in zip("qkv", (q, k, v), strict=True)},
            {"lse": wide[1].detach()},
        ):
            before = found.call_count
            got = call.run(**changed)
            with nothing_kept():
                assert torch.equal(got[0], call.run(**changed)[0]), changed.keys()
            assert found.call_count == before + 2, changed.keys()


@each_of_some
@pytest.mark.parametrize("name", ["start", "stop", "bits", "columns"])
def test_a_selection_that_was_written_to_is_refused_in_the_backward(case: str, name: str) -> None:
    call = make(case, "reference")
    places = {
        "bits": getattr(call.options.get("allowed"), "bits", None),
        "columns": call.options.get("columns"),
    }
    written = places[name] if name in places else getattr(call.options["rows"], name)
    if written is None:
        pytest.skip("this case has none")
    inputs = {n: x if n in call.fixed else leaf(x) for n, x in call.inputs.items()}
    result = call.run(**inputs)[0]
    written.add_(0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@each_of_some
def test_hooks_may_lay_saved_tensors_otherwise(case: str, backend: str) -> None:
    """As those of offloading do: the backward reads other strides than the forward did."""
    call = make(case, backend)
    strided = {
        name: x.transpose(0, 1).contiguous().transpose(0, 1)
        for name, x in call.inputs.items()
        if name not in call.fixed
    }
    call = replace(call, inputs={**call.inputs, **strided})
    wanted = run(call)
    saved = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)
    )
    for got, x in zip(run(call, saved), wanted, strict=True):
        torch.testing.assert_close(got, x, equal_nan=True)


@each_of_some
def test_many_upstream_gradients_at_once(case: str) -> None:
    """They are one tensor without memory that a kernel could read."""
    call = make(case, "native" if "native" in BACKENDS else "reference")
    q = leaf(call.inputs["q"])
    result = call.run(q=q)[0]
    many = torch.stack([randn(i, *result.shape, dtype=q.dtype, device=CPU) for i in range(3)])
    (got,) = torch.autograd.grad(result, q, many, is_grads_batched=True, retain_graph=True)
    for one, upstream in zip(got, many, strict=True):
        assert torch.equal(one, torch.autograd.grad(result, q, upstream, retain_graph=True)[0])


@each_of_some
def test_inputs_that_were_written_to_are_refused_in_the_backward(case: str) -> None:
    call = make(case, "reference")
    inputs = {n: x if n in call.fixed else leaf(x) for n, x in call.inputs.items()}
    result = call.run(**inputs)[0]
    with torch.no_grad():
        inputs["k"].add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        result.sum().backward()


@each_of_some
def test_no_second_derivative_is_made_up(case: str) -> None:
    call = make(case, "reference")
    inputs = {n: x if n in call.fixed else leaf(x) for n, x in call.inputs.items()}
    result = call.run(**inputs)[0]
    (slope,) = torch.autograd.grad(result.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


@each_of_some
def test_kernels_run_on_their_tensors_device_and_without_autocast(case: str) -> None:
    call, name = make(case, "reference"), case.split("/")[0]
    op, inside, ran = OPS[name], [], []

    @contextmanager
    def body(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    kernels = op.kernels("reference")

    def noted(way: str):
        plain = getattr(kernels, way)

        def noting(*args):
            ran.append((way, list(inside)))
            return plain(*args)

        return noting

    with (
        mock.patch.object(together, "in_body", body),
        mock.patch.object(kernels, "forward", noted("forward")),
        mock.patch.object(kernels, "backward", noted("backward")),
    ):
        run(call)
    assert ran == [("forward", [CPU]), ("backward", [CPU])]


@each_of_some
def test_copies_remember_nothing(case: str) -> None:
    """What was found may hold compiled kernels, which cannot be copied."""
    call = make(case, "reference")
    wanted = run(call)
    rows = call.options["rows"]
    assert "_kept" in vars(rows)
    for other in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert "_kept" not in vars(other)
        again = replace(call, options={**call.options, "rows": other})
        assert all(torch.equal(a, b) for a, b in zip(run(again), wanted, strict=True))


def test_transforms_and_subclasses_go_through_the_dispatcher() -> None:
    """They need it; here they need not be served, only not be bypassed."""

    class Other(Tensor):
        pass

    x = torch.zeros(2)
    assert calls.is_direct([x, None, torch.nn.Parameter(x)])
    assert not calls.is_direct([x, x.as_subclass(Other)])
    assert not calls.is_direct([torch.zeros(2, device="meta")])
    with Watching():
        assert not calls.is_direct([x])
    seen = []
    torch.func.vmap(lambda y: (seen.append(calls.is_direct([y])), y)[1])(x)
    torch.func.grad(lambda y: (seen.append(calls.is_direct([y])), y.sum())[1])(x)
    assert seen == [False, False]


def test_without_gradients_nothing_is_saved() -> None:
    call = make("side_attention/causal", "reference")
    with torch.no_grad():
        assert call.run(q=leaf(call.inputs["q"]))[0].grad_fn is None
    assert call.run()[0].grad_fn is None, "no input requires grad"


def test_rows_of_inference_mode_serve_a_training_step() -> None:
    """Nothing is known of writes to them, so that each call looks at them."""
    with torch.inference_mode():
        rows = QueryRows.causal(torch.zeros(2, dtype=torch.int32), torch.tensor([1, 3]))
        sets = KeySets.from_bool(torch.ones(1, 5, dtype=torch.bool), torch.zeros(2).int())
    q = torch.randn(2, 2, 8, requires_grad=True)
    k, v = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    side_attention(q, k, v, rows, allowed=sets, backend="reference").out.sum().backward()
    assert q.grad.isfinite().all() and "_kept" not in vars(rows)


def test_a_node_is_applied_as_torch_applies_it() -> None:
    """Refused by transforms, which need more of a node than ours has."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2.0 * x

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            return 2.0 * dy

    x = torch.ones(3, requires_grad=True)
    y = calls.applied(Double, x)
    assert y.grad_fn.name() == Double.apply(x).grad_fn.name()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], 2.0 * upstream)
    assert not calls.applied(Double, x.detach()).requires_grad
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(lambda z: calls.applied(Double, z).sum())(x.detach())
