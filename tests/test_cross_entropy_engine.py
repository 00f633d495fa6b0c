"""The model of the Triton loss: its work against arithmetic by hand, its memory against a
measurement."""

from itertools import accumulate

import pytest
import torch

from benchmarks.costs.cross_entropy_engine import Head, extra_bytes, flops, moved_bytes
from groundkern import available_backends, linear_cross_entropy, row_blocks
from tests.allocations import allocations


def test_three_matmuls_or_two() -> None:
    assert flops(Head(4096, 4096, 128256)) == 3 * 2 * 4096 * 4096 * 128256
    assert flops(Head(4096, 4096, 128256, trained=False)) == 2 * 2 * 4096 * 4096 * 128256


def test_bytes_of_one_chunk_by_hand() -> None:
    """W read twice and dW written; logits written and read, read again for 2-byte gradients that
    are written and read twice."""
    head = Head(137, 2048, 151936)
    states = 137 * 2048
    by_hand = 3 * 2 * 2048 * 151936 + (8 + 4 + 3 * 2) * 137 * 151936
    by_hand += (2 + 2) * states + (4 + 4 + 2) * states  # h read twice; dh summed, read, cast
    assert moved_bytes(head) == by_hand


def test_more_chunks_move_more() -> None:
    few, many = Head(1024, 3584, 152064), Head(1536, 3584, 152064)
    assert [len(h.chunks) for h in (few, many)] == [1, 2]
    assert moved_bytes(many) > 1.5 * moved_bytes(few)


def test_memory_is_the_budget_and_the_gradients_whatever_the_rows() -> None:
    for rows in (4096, 16384, 65536):
        head = Head(rows, 2048, 151936)
        gradients = 6 * 2048 * (151936 + rows)
        assert extra_bytes(head) <= row_blocks.LOGIT_BYTES + gradients


@pytest.mark.skipif(available_backends()["triton"] is not None, reason="needs the triton package")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("rows", "dim", "words", "budget"),
    [
        (48, 16, 9000, 2**30),  # one chunk, logits the larger part
        (48, 16, 9000, 2**20),  # four
        (6, 64, 9000, 2**30),  # a few rows: the weight's gradient is all there is
        (64, 128, 3000, 2**19),  # wide states in three chunks
    ],
)
def test_memory_matches_a_measurement(rows, dim, words, budget, trained, tmp_path, monkeypatch):
    """fp32 in the interpreter on CPU tensors: peak of torch's allocator within 5 %."""
    monkeypatch.setattr(row_blocks, "LOGIT_BYTES", budget)
    head = Head(rows, dim, words, itemsize=4, trained=trained)
    hidden = torch.randn(head.rows, head.dim, requires_grad=True)
    weight = torch.randn(head.vocabulary, head.dim, requires_grad=trained)
    target = torch.randint(head.vocabulary, (head.rows,))

    def step() -> None:
        linear_cross_entropy(hidden, weight, target, backend="triton").loss.backward()
        hidden.grad = weight.grad = None

    step()
    peak = max(accumulate(allocations(step, tmp_path)))
    assert peak == pytest.approx(extra_bytes(head), rel=0.05)
