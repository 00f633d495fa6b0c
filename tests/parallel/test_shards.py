"""Which rank holds which token, against what torch and DeepSpeed do; one process, no group."""

from __future__ import annotations

import pytest
import torch

from groundkern.parallel import LocalColumns, Sharding


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_zigzag_is_what_torchs_load_balancer_does(ranks: int) -> None:
    name = "torch.distributed.tensor.experimental._context_parallel._load_balancer"
    module = pytest.importorskip(name, reason="torch keeps it private, and has moved it")
    for pieces in (1, 2, 5):
        length = 2 * ranks * pieces
        order = module._HeadTailLoadBalancer(length, ranks, "cpu")._generate_indices()[0].long()
        zigzag = Sharding.zigzag(length, ranks)
        assert torch.equal(Sharding.from_order(order, ranks).owner, zigzag.owner)
        here = order.chunk(ranks)  # as torch cuts it
        assert all(torch.equal(zigzag.positions(r), here[r]) for r in range(ranks))


def test_even_pieces_are_deepspeeds() -> None:
    tokens = torch.arange(12)
    chunk = 12 // 3  # batch[k][:, chunk * rank : chunk * (rank + 1)]
    for rank in range(3):
        expected = tokens[chunk * rank : chunk * (rank + 1)]
        assert torch.equal(Sharding.even(12, 3).positions(rank), expected)


@pytest.mark.parametrize(
    "sharding",
    [
        Sharding.contiguous([3, 0, 10]),
        Sharding.zigzag(13, 3),
        Sharding.striped(13, 3, block=2),
        Sharding(torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 0, 0, 0, 1]), 3),
    ],
)
def test_every_token_is_on_one_rank(sharding: Sharding) -> None:
    positions = [sharding.positions(rank) for rank in range(3)]
    assert all(bool((p.diff() > 0).all()) for p in positions)
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(13))


def test_zigzag_of_any_length_is_balanced() -> None:
    for length in range(60):
        for ranks in (2, 3, 4):
            counts = [len(Sharding.zigzag(length, ranks).positions(r)) for r in range(ranks)]
            assert sum(counts) == length
            assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sharding.even(13, 3), "`length`: expected a multiple of the 3 ranks, got 13"),
        (lambda: Sharding.from_order(torch.arange(5), 2), "`order`: expected a multiple of 2"),
        (lambda: Sharding.from_order(torch.tensor([0, 0]), 2), "`order`: expected a permutation"),
        (
            lambda: Sharding.from_order(torch.tensor([1, 0, 2, 3]), 2),
            "`order`: expected ascending tokens on every rank",
        ),
        (lambda: Sharding(torch.tensor([0, 2]), 2), r"`owner`: expected ranks in \[0, 2\)"),
        (lambda: Sharding.striped(4, 2, block=0), "`block`: expected at least one token"),
        (lambda: Sharding.contiguous([]), "`ranks`: expected at least one"),
    ],
)
def test_what_is_no_sharding_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_targets_local_columns() -> None:
    from groundkern import QueryRows

    rows = QueryRows.causal(torch.tensor([0, 1]), torch.tensor([5, 5]))
    place = torch.tensor([[2, 0], [1, -1]])
    target = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    local = LocalColumns(torch.zeros(2, 2, dtype=torch.int32), place)
    expected = torch.tensor([[0.3, 0.1], [0.5, 0.0]])
    assert torch.equal(local.take(target, rows), expected)
