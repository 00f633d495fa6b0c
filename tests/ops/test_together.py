"""Ops of one layer that are asked for together: what each computes alone, in one node."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from groundkern import KeySets, QueryRows, asked, available_backends
from groundkern.kept import nothing_kept
from groundkern.ops.cases import randn

BACKENDS = [name for name, why in available_backends().items() if why is None]
CPU = torch.device("cpu")
KEYS, DIM = 37, 16
each_backend = pytest.mark.parametrize("backend", BACKENDS)
USED = [used for used in product((False, True), repeat=4) if any(used)]
Inputs = dict[str, Tensor]


def _rows(*position: int) -> QueryRows:
    sequence = torch.tensor([0] * (len(position) - 1) + [1], dtype=torch.int32)
    return QueryRows.causal(sequence, torch.tensor(position))


ROWS = {"side": _rows(3, 30, 12), "kl": _rows(36, 20), "map": _rows(8, 8, 11, 36)}
COLUMNS = torch.tensor([[0, 2, 3, 7, 8], [1, 4, 6, 10, -1]], dtype=torch.int32)
TARGET = torch.rand(2, 5, generator=torch.Generator().manual_seed(3)) + 0.1
MEMBERS = torch.rand(3, KEYS, generator=torch.Generator().manual_seed(4)) < 0.6
SETS = KeySets.from_bool(MEMBERS, torch.arange(3, dtype=torch.int32))


def _inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    sizes = {name: (len(rows), 4, DIM) for name, rows in ROWS.items()}
    sizes |= {"k": (2, 2, KEYS, DIM), "v": (2, 2, KEYS, 24)}
    return {
        name: randn(seed, *size, dtype=dtype, device=CPU).requires_grad_()
        for seed, (name, size) in enumerate(sizes.items())
    }


def _asked(x: Inputs, backend: str) -> list[asked.Asked]:
    k, options = x["k"], {"backend": backend}
    return [
        asked.side_attention(x["side"], k, x["v"], ROWS["side"], allowed=SETS, **options),
        asked.attention_kl(x["kl"], k, TARGET, ROWS["kl"], COLUMNS, over="columns", **options),
        asked.attention_map(x["map"], k, ROWS["map"], COLUMNS, over="visible", **options),
    ]


def _flat(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [x for result in results for x in result]


def _apart(x: Inputs, backend: str) -> list[Tensor]:
    return _flat([asked.run([each])[0] for each in _asked(x, backend)])


def _together(x: Inputs, backend: str) -> list[Tensor]:
    return _flat(asked.run(_asked(x, backend)))


def _gradients(results: list[Tensor], x: Inputs, used: tuple[bool, ...], **options):
    chosen = [(y, randn(9 + i, *y.shape, dtype=y.dtype, device=CPU)) for i, y in enumerate(results)]
    chosen = [pair for pair, is_used in zip(chosen, used, strict=True) if is_used]
    results, above = zip(*chosen, strict=True)
    return torch.autograd.grad(results, list(x.values()), above, allow_unused=True, **options)


@each_backend
def test_results_and_gradients_are_those_apart(backend: str) -> None:
    """Whichever results have a gradient; what no gradient reaches has none."""
    x = _inputs()
    wanted, found = _apart(x, backend), _together(x, backend)
    assert all(map(torch.equal, found, wanted))
    for used in USED if backend != "triton" else USED[-1:] + [(True, False, True, False)]:
        pairs = zip(
            _gradients(found, x, used, retain_graph=True),
            _gradients(wanted, x, used, retain_graph=True),
            x,
            strict=True,
        )
        for got, truth, name in pairs:
            assert (got is None) == (truth is None), (used, name)
            if got is not None:
                torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


@each_backend
def test_one_gradient_of_the_keys(backend: str) -> None:
    x = _inputs()
    nodes = {y.grad_fn for y in _together(x, backend)}
    assert len(nodes) == 1
    (node,) = nodes
    leaves = [edge.variable for edge, _ in node.next_functions if edge is not None]
    assert sum(leaf is x["k"] for leaf in leaves) == sum(leaf is x["v"] for leaf in leaves) == 1


@each_backend
@pytest.mark.parametrize("frozen", ["k", "v", "side", "kl"])
def test_an_input_without_a_gradient(backend: str, frozen: str) -> None:
    if backend == "triton" and frozen != "k":
        pytest.skip("the interpreter is slow: it runs one case")
    x = _inputs()
    x[frozen].requires_grad_(False)
    trained = {name: y for name, y in x.items() if name != frozen}
    pairs = (_gradients(f(x, backend), trained, (True,) * 4) for f in (_together, _apart))
    for got, truth in zip(*pairs, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


def test_other_keys_are_another_node() -> None:
    """And so are other values; results come in the order in which they were asked for."""
    x, y = _inputs(), _inputs(torch.float64)
    calls = [call for pair in zip(_asked(x, "reference"), _asked(y, "reference")) for call in pair]
    found = asked.run(calls)
    assert [result[0].dtype for result in found] == [torch.float32, torch.float64] * 3
    for mine, other in ((found[::2], x), (found[1::2], y)):
        assert all(map(torch.equal, _flat(mine), _apart(other, "reference")))
    value = x["v"].detach().clone().requires_grad_()
    first, second = (
        asked.side_attention(x["side"], x["k"], v, ROWS["side"], backend="reference")
        for v in (x["v"], value)
    )
    (out, _), (other, _) = asked.run([first, second])
    assert out.grad_fn is not other.grad_fn and torch.equal(out, other)
    grads = torch.autograd.grad((out * 2 + other).sum(), (x["v"], value))
    torch.testing.assert_close(grads[0], grads[1] * 2)


def test_nothing_asked_is_nothing_answered() -> None:
    assert asked.run([]) == []


def test_batched_and_double_gradients_take_the_ops() -> None:
    x = _inputs()
    found = _together(x, "reference")
    many = [
        torch.stack([randn(i, *y.shape, dtype=y.dtype, device=CPU) for i in (1, 2)]) for y in found
    ]
    leaves = list(x.values())
    got = torch.autograd.grad(found, leaves, many, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = torch.autograd.grad(found, leaves, [y[i] for y in many], retain_graph=True)
        for batched, single in zip(got, one, strict=True):
            torch.testing.assert_close(batched[i], single, rtol=1e-6, atol=1e-6)
    # Only one of them has batched gradients: the others' are not written to.
    mixed = [many[0], *[y[0] for y in many[1:]]]

    def of_one(above: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(found, leaves, [above, *mixed[1:]], retain_graph=True)

    got = torch.func.vmap(of_one)(mixed[0])
    for i in range(2):
        for batched, single in zip(got, of_one(mixed[0][i]), strict=True):
            torch.testing.assert_close(batched[i], single, rtol=1e-6, atol=1e-6)
    slopes = torch.autograd.grad([y.sum() for y in found], leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sum(slope.square().sum() for slope in slopes).backward()


class _Layers:
    """Calls that `Repeated` has made."""

    def __init__(self) -> None:
        self.repeated, self.made = asked.Repeated(), 0

    def __call__(self, x: Inputs, options: object = None) -> list[Tensor]:
        def make() -> asked.Asked:
            self.made += 1
            return asked.side_attention(x["side"], x["k"], x["v"], ROWS["side"], allowed=SETS)

        tensors = {"q": x["side"], "k": x["k"], "v": x["v"], "lse": None}
        return list(asked.run([self.repeated(options, tensors, make)])[0])


def test_a_repeated_call_is_made_once_for_tensors_that_are_alike() -> None:
    layers, x = _Layers(), _inputs()
    for seed in range(3):
        other = {name: y.detach() * (seed + 1) for name, y in x.items()}
        found = layers(other)
        with nothing_kept():
            assert all(map(torch.equal, found, _Layers()(other)))
    assert layers.made == 1
    strided = x | {"k": x["k"].detach().transpose(1, 2).contiguous().transpose(1, 2)}
    narrow = {name: y.detach().bfloat16() for name, y in x.items()}
    off = torch.zeros(x["side"].numel() + 1)[1:].view(x["side"].shape).copy_(x["side"].detach())
    for made, changed in enumerate((strided, narrow, x | {"side": off}), 2):
        found = layers(changed)
        assert layers.made == made
        assert all(map(torch.equal, found, _Layers()(changed)))
    layers(x, "others")
    assert layers.made == 5


def test_a_repeated_call_holds_no_tensor_of_a_layer() -> None:
    layers, x = _Layers(), _inputs()
    layers(x)
    ((_, _, known),) = layers.repeated._known
    assert set(known.inputs) == {None}


def test_autocast_casts_in_every_layer() -> None:
    layers, x = _Layers(), _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = [layers(x)[0].dtype for _ in range(2)]
    assert found == [torch.bfloat16] * 2 and layers.made == 2
