"""Queries of rows beside the main pass: one gradient for both, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundkern import QueryRows
from groundkern.hf.model.taken import take_beside

LENGTH = 6


def _rows(sequence: tuple[int, ...], position: tuple[int, ...]) -> QueryRows:
    return QueryRows.causal(torch.tensor(sequence), torch.tensor(position))


# One place twice within a selection and once more in the other; a padding row.
SELECTIONS = (_rows((0, 0, 0, 1), (2, 2, 5, -1)), _rows((0, 1, 1), (2, 3, 5)))
PARTS = ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0))


def _query(total: int) -> Tensor:
    """[B, Hq, T, D] as a projection lays it."""
    draw = torch.Generator().manual_seed(total)
    x = torch.randn(2, total, 3, 4, generator=draw, dtype=torch.float64)
    return x.transpose(1, 2).requires_grad_()


def _beside(query: Tensor) -> tuple[Tensor, ...]:
    main, taken = take_beside(query, LENGTH, (*SELECTIONS, SELECTIONS[0]))
    assert len(taken) == 2 or not query.requires_grad or not torch.is_grad_enabled()
    return main, *(taken.get(id(rows), rows.take(main)) for rows in SELECTIONS)


def _apart(query: Tensor) -> tuple[Tensor, ...]:
    main = query[:, :, :LENGTH]
    return main, *(rows.take(main) for rows in SELECTIONS)


def _gradient(function, query: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Of a loss on some of the results, with uneven upstream gradients."""
    draw = torch.Generator().manual_seed(3)
    results = function(query)
    upstream = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in results]
    pairs = zip(results, upstream, parts, strict=True)
    loss = sum((x * dx).sum() for x, dx, counted in pairs if counted)
    return torch.autograd.grad(loss, query)[0]


each_total = pytest.mark.parametrize("total", [LENGTH, LENGTH + 3], ids=["alone", "side tokens"])


@each_total
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_gradient_is_that_of_both_apart(total: int, parts: tuple[int, ...]) -> None:
    query = _query(total)
    for a, b in zip(_beside(query), _apart(query), strict=True):
        assert torch.equal(a, b)
    found, wanted = (_gradient(f, query, parts) for f in (_beside, _apart))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, _gradient(_beside, query, parts)), "the same bits"


@each_total
def test_it_differentiates_twice(total: int) -> None:
    query = _query(total)
    assert torch.autograd.gradcheck(_beside, query)
    assert torch.autograd.gradgradcheck(_beside, query)


@each_total
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(total: int, reentrant: bool) -> None:
    query = _query(total)

    def recomputed(query: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(_beside, query, use_reentrant=reentrant)

    wanted = _gradient(_beside, query, (1, 1, 1))
    leaf = query.detach().requires_grad_()  # reentrant checkpointing needs backward()
    draw = torch.Generator().manual_seed(3)
    results = recomputed(leaf)
    upstream = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in results]
    torch.autograd.backward(results, upstream)
    assert torch.equal(leaf.grad, wanted)


@each_total
def test_gradients_that_others_hold_stay_as_they_are(total: int) -> None:
    query = _query(total)
    main, first, _ = _beside(query)
    held, rows = torch.randn_like(main), torch.randn_like(first)
    kept = held.clone()
    torch.autograd.grad((main, first), query, (held, rows))
    assert torch.equal(held, kept)


@each_total
def test_expanded_gradients(total: int) -> None:
    query = _query(total)
    main, first, _ = _beside(query)
    ones = torch.ones((), dtype=main.dtype)
    upstream = (ones.expand(main.shape), ones.expand(first.shape))
    found = torch.autograd.grad((main, first), query, upstream)[0]
    apart = _apart(query)[:2]
    wanted = torch.autograd.grad(apart, query, upstream)[0]
    torch.testing.assert_close(found, wanted)


def test_without_gradients_and_compiled_there_is_nothing_to_share() -> None:
    query = _query(LENGTH)
    with torch.no_grad():
        assert take_beside(query, LENGTH, SELECTIONS)[1] == {}
    assert take_beside(query.detach(), LENGTH, SELECTIONS)[1] == {}

    def loss(query: Tensor) -> Tensor:
        main, taken = take_beside(query, LENGTH, SELECTIONS[:1])
        rows = SELECTIONS[0]
        first = taken.get(id(rows), None)
        return main.sin().sum() + (rows.take(main) if first is None else first).cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(query), query)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, wanted)


def test_places_follow_what_is_written_to_the_rows() -> None:
    rows = _rows((0, 1), (2, 3))
    x = torch.arange(12.0).view(2, 6, 1)
    assert rows.take(x).flatten().tolist() == [2, 9]
    assert rows.places()[0] is rows.places()[0]
    rows.position.add_(1)
    assert rows.take(x).flatten().tolist() == [3, 10]
    with torch.inference_mode():
        other = _rows((0,), (1,))
        assert other.take(x).flatten().tolist() == [1]
    rows = _rows((0,), (1,))
    with torch.inference_mode():
        rows.take(x)
    rows.take(x.requires_grad_()).sum().backward()  # not with an index made in inference mode
