"""Queries of rows beside the main pass: one gradient for both, and nothing else changed."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundkern import QueryRows
from groundkern.beside import take_beside
from groundkern.hf.model.attention import LAYER, RUN, grounded
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.rows import Rows
from groundkern.taken import Places

LENGTH = 6


def _rows(*position: tuple[int, ...]) -> Rows:
    return Rows(
        torch.tensor(position), torch.zeros(torch.tensor(position).shape, dtype=torch.int32)
    )


# One place twice within a selection and once more in the other; a padding row.
SELECTIONS = (_rows((2, 2, 5), (1, -1, 1)), _rows((2, 0), (5, 3)))
PARTS = [parts for parts in product((0, 1), repeat=5) if any(parts)]


def _inputs(total: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, D] as projections lay them, with their own H and D."""
    draw = torch.Generator().manual_seed(total)
    shapes = (2, total, 3, 4), (2, total, 1, 4), (2, total, 1, 2)
    drawn = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return tuple(x.transpose(1, 2).requires_grad_() for x in drawn)


def _beside(*inputs: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _, _, taken = take_beside(*inputs, LENGTH, Places(SELECTIONS, inputs[0].shape[2]))
    return q, k, v, *(taken[rows] for rows in SELECTIONS)


def _apart(*inputs: Tensor) -> tuple[Tensor, ...]:
    tensors = [x[:, :, :LENGTH] for x in inputs]
    return *tensors, *(rows.at(None).take(tensors[0]) for rows in SELECTIONS)


def _gradients(function, inputs: tuple[Tensor, ...], parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Of a loss on some of the results, with uneven upstream gradients."""
    pairs = zip(*_upstream(function(*inputs)), parts, strict=True)
    loss = sum((x * dx).sum() for x, dx, counted in pairs if counted)
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def _upstream(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return results, [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in results]


each_total = pytest.mark.parametrize("total", [LENGTH, LENGTH + 3], ids=["alone", "side tokens"])


@each_total
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_gradient_is_that_of_both_apart(total: int, parts: tuple[int, ...]) -> None:
    inputs = _inputs(total)
    for a, b in zip(_beside(*inputs), _apart(*inputs), strict=True):
        assert torch.equal(a, b)
    found, wanted, again = (_gradients(f, inputs, parts) for f in (_beside, _apart, _beside))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, found, again)), "the same bits"


def _all_results(inputs: tuple[Tensor, ...], triton: bool) -> tuple[Tensor, ...]:
    """What main pass and ops beside it are given, by their names in `Beside`."""
    places = Places(SELECTIONS, inputs[0].shape[2], triton)
    *tensors, taken = take_beside(*inputs, LENGTH, places)
    return *tensors, *(taken[rows] for rows in SELECTIONS)


RESULTS = ("q", "k", "v", "own k", "own v", "one selection", "the other")
USED = [used for used in product((0, 1), repeat=7) if sum(used) in (1, 2, 7)]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@each_total
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_joins_what_torch_joins(total: int, dtype: torch.dtype) -> None:
    """Whichever results have a gradient: of any strides, and off multiples of 16 bytes."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in _inputs(total)]
    found, wide = (
        _all_results(x, triton)
        for x, triton in ((inputs, True), ([x.double() for x in inputs], False))
    )
    close = {"rtol": 2**-8 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}
    draw = torch.Generator().manual_seed(5)
    upstream = []
    for number, x in enumerate(found):
        sizes = x.transpose(0, -1).shape if number % 2 else x.shape
        flat = torch.randn(x.numel() + 1, generator=draw, dtype=torch.float64).to(dtype)[1:]
        upstream.append(flat.view(sizes).transpose(0, -1) if number % 2 else flat.view(sizes))
    for used in USED:
        pairs = [(x, y, dx) for x, y, dx, n in zip(found, wide, upstream, used, strict=True) if n]
        results, wanted, above = zip(*pairs, strict=True)
        got = torch.autograd.grad(results, inputs, above, retain_graph=True, materialize_grads=True)
        truth = torch.autograd.grad(
            wanted, inputs, [dx.double() for dx in above], retain_graph=True, materialize_grads=True
        )
        for x, y in zip(got, truth, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x, y.to(dtype), **close)


@each_total
@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["query", "key", "value"])
def test_an_input_without_a_gradient(total: int, frozen: int) -> None:
    inputs = _inputs(total)
    inputs[frozen].requires_grad_(False)
    results = _beside(*inputs)
    assert [x.requires_grad for x in results] == [x.requires_grad for x in _apart(*inputs)]
    trained = [x for x in inputs if x.requires_grad]

    def gradients(function) -> tuple[Tensor, ...]:
        pairs = zip(*_upstream(function(*inputs)), strict=True)
        return torch.autograd.grad(sum((x * dx).sum() for x, dx in pairs), trained)

    torch.testing.assert_close(gradients(_beside), gradients(_apart), rtol=1e-12, atol=1e-12)


@each_total
def test_it_differentiates_twice(total: int) -> None:
    inputs = _inputs(total)
    assert torch.autograd.gradcheck(_beside, inputs)
    assert torch.autograd.gradgradcheck(_beside, inputs)


@each_total
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(total: int, reentrant: bool) -> None:
    inputs = _inputs(total)
    wanted = _gradients(_beside, inputs, (1, 1, 1, 1, 1))
    leaves = [x.detach().requires_grad_() for x in inputs]  # reentrant needs backward()
    torch.autograd.backward(*_upstream(checkpoint(_beside, *leaves, use_reentrant=reentrant)))
    assert all(torch.equal(x.grad, dx) for x, dx in zip(leaves, wanted, strict=True))


@each_total
def test_gradients_that_others_hold_stay_as_they_are(total: int) -> None:
    inputs = _inputs(total)
    results, held = _upstream(_beside(*inputs))
    kept = [x.clone() for x in held]
    torch.autograd.grad(results, inputs, held)
    assert all(map(torch.equal, held, kept))


@each_total
def test_expanded_gradients(total: int) -> None:
    inputs, one = _inputs(total), torch.ones((), dtype=torch.float64)

    def gradients(function) -> tuple[Tensor, ...]:
        results = function(*inputs)
        return torch.autograd.grad(results, inputs, [one.expand(x.shape) for x in results])

    torch.testing.assert_close(gradients(_beside), gradients(_apart))


def test_no_order_of_adding_changes_the_sums(monkeypatch) -> None:
    """CUDA adds rows to a gradient in any order: no place gets two that are not 0."""
    inputs, added = _inputs(LENGTH), []
    index_add_ = Tensor.index_add_

    def note(self, dim, index, source):
        added.append((index, source))
        return index_add_(self, dim, index, source)

    monkeypatch.setattr(Tensor, "index_add_", note)
    _gradients(_beside, inputs, (1, 1, 1, 1, 1))
    ((place, source),) = added
    counted = place[source.any(1)]
    assert len(counted) == len(counted.unique()) == len(place.unique()) == 7
    assert len(place) == 10


def test_rows_are_added_where_they_were_taken_from() -> None:
    """Even if the batch's buffers were filled with the next batch before the backward."""
    rows, (query, key, value) = _rows((2,)), _inputs(LENGTH)
    first = take_beside(query[:1], key, value, LENGTH, Places((rows,), LENGTH))[-1][rows]
    rows.position.fill_(4)
    (gradient,) = torch.autograd.grad(first.sum(), query)
    assert gradient.sum((1, 3)).nonzero().tolist() == [[0, 2]]


def test_no_rows_at_all() -> None:
    inputs, places = _inputs(LENGTH + 1), Places((_rows((), ()),), LENGTH + 1)
    results = take_beside(*inputs, LENGTH, places)[:3]
    assert all(dx.any() for dx in torch.autograd.grad(sum(x.sum() for x in results), inputs))


def test_without_gradients() -> None:
    inputs = _inputs(LENGTH)
    with torch.no_grad():
        assert all(map(torch.equal, _beside(*inputs), _apart(*inputs)))
    assert take_beside(*inputs, LENGTH, None)[-1] == {}


class _Queries:
    """A reading of the rows' queries."""

    uses_lse = True

    def __init__(self, rows: Rows) -> None:
        self.rows, self.found = rows, []

    def rows_in(self, number: int) -> Rows:
        return self.rows

    def read(self, run: BodyRun, layer: Layer) -> None:
        self.found.append(layer.queries(self.rows))


@each_total
def test_a_compiled_layer(total: int) -> None:
    module = torch.nn.Module()
    module.__dict__[LAYER] = 0

    def attention(module, query, key, value, mask) -> tuple[Tensor, None]:
        return query * value[..., :1], None

    attend = grounded(attention, "sdpa")

    def loss(*inputs: Tensor) -> Tensor:
        readings = [_Queries(rows) for rows in SELECTIONS]
        run = BodyRun(LENGTH, "reference", readings)
        out, _ = attend(module, *inputs, None, **{RUN: run})
        found = [x for reading in readings for x in reading.found]
        assert len(found) == 2 and out.shape[2] == LENGTH
        return sum(x.sin().sum() for x in (out, *found))

    inputs = _inputs(total)
    compiled = torch.compile(loss, backend="aot_eager")
    gradients = (
        torch.autograd.grad(f(*inputs), inputs, materialize_grads=True) for f in (compiled, loss)
    )
    torch.testing.assert_close(*gradients)


def _query_rows(sequence: tuple[int, ...], position: tuple[int, ...]) -> QueryRows:
    return QueryRows.causal(torch.tensor(sequence), torch.tensor(position))


def test_places_follow_what_is_written_to_the_rows() -> None:
    rows = _query_rows((0, 1), (2, 3))
    x = torch.arange(12.0).view(2, 6, 1)
    assert rows.take(x).flatten().tolist() == [2, 9]
    assert rows.places()[0] is rows.places()[0]
    rows.position.add_(1)
    assert rows.take(x).flatten().tolist() == [3, 10]
    with torch.inference_mode():
        other = _query_rows((0,), (1,))
        assert other.take(x).flatten().tolist() == [1]
    rows = _query_rows((0,), (1,))
    with torch.inference_mode():
        rows.take(x)
    rows.take(x.requires_grad_()).sum().backward()  # not with an index made in inference mode


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_are_taken_from_any_layout(batch: int, order: tuple[int, ...]) -> None:
    """However [B, H, T, D] lies in memory, in the middle of other numbers, and without D."""
    places = Places([_rows(*((2, 2, 5), (1, -1, 1))[:batch])], LENGTH)
    shape = batch + 1, 3, LENGTH + 2, 4
    whole = torch.randn([shape[i] for i in order], dtype=torch.float64)
    whole = whole.permute([order.index(i) for i in range(4)])[1:, :, 1:-1]
    for x in (whole, whole[..., 0], whole[:, :1].expand(-1, 3, -1, -1), whole[..., ::2]):
        (found,) = places.take(x)
        assert torch.equal(found, x[places.sequence, :, places.position])
    every = whole[:, :, :1].expand(-1, -1, LENGTH, -1)
    assert torch.equal(places.take(every)[0], every[places.sequence, :, places.position])
