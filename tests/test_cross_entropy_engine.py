"""The model of the Triton loss: its work against arithmetic by hand, its memory against a
measurement."""

from itertools import accumulate

import pytest
import torch

from benchmarks.costs.cross_entropy_engine import (
    Head,
    busy,
    extra_bytes,
    flops,
    moved_bytes,
    waves,
)
from groundkern import available_backends, linear_cross_entropy, row_blocks
from groundkern.row_blocks import logit_chunks
from tests.allocations import allocations


def test_three_matmuls_or_two() -> None:
    assert flops(Head(4096, 4096, 128256)) == 3 * 2 * 4096 * 4096 * 128256
    assert flops(Head(4096, 4096, 128256, trained=False)) == 2 * 2 * 4096 * 4096 * 128256


def test_bytes_of_one_chunk_by_hand() -> None:
    """W read twice and dW written; a logit written by its product, read and overwritten by the row
    kernel, read by two products, all in 2 bytes."""
    head = Head(137, 2048, 151936)
    states = 137 * 2048
    by_hand = 3 * 2 * 2048 * 151936 + 5 * 2 * 137 * 151936
    by_hand += 3 * 2 * states  # h read twice, dh written
    assert moved_bytes(head) == by_hand


def test_more_chunks_move_more() -> None:
    few, many = Head(3400, 3584, 152064), Head(3600, 3584, 152064)
    assert [len(h.chunks) for h in (few, many)] == [1, 2]
    assert moved_bytes(many) > 1.2 * moved_bytes(few)


def test_nothing_is_as_large_as_the_weight_but_its_gradient() -> None:
    """4096 rows are one chunk of 1 GiB; up to four chunks are summed in the weight's dtype."""
    for rows, chunks in ((4096, 1), (8192, 2), (16384, 4)):
        head = Head(rows, 4096, 128256)
        assert len(head.chunks) == chunks
        weight = 2 * 4096 * 128256
        assert extra_bytes(head) <= row_blocks.LOGIT_BYTES + weight + 2 * rows * 4096
    assert Head(32768, 4096, 128256).summed == 4


def test_heights_are_chosen_by_the_waves_of_dhidden() -> None:
    """At 1366 rows a chunk, three chunks of dh [1366, 4096] take two rounds of the processors each;
    four of 1024 take one."""
    chunks = logit_chunks(4096, 128256, 2, 1400 * 128256 * 2, dim=4096)
    assert [c.stop - c.start for c in chunks] == [1024] * 4
    assert sum(waves(c.stop - c.start, 4096) for c in chunks) == 4
    assert 3 * waves(1366, 4096) == 6
    assert busy(2048, 4096) == pytest.approx(256 / 264)
    assert len(logit_chunks(4096, 128256, 2, 1400 * 128256 * 2)) == 3, "without, as few as fit"


def test_memory_is_the_budget_and_the_gradients_whatever_the_rows() -> None:
    for rows in (4096, 16384, 65536):
        head = Head(rows, 2048, 151936)
        gradients = 6 * 2048 * (151936 + rows)
        assert extra_bytes(head) <= row_blocks.LOGIT_BYTES + gradients


@pytest.mark.skipif(available_backends()["triton"] is not None, reason="needs the triton package")
@pytest.mark.parametrize("trained", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("rows", "dim", "words", "budget"),
    [
        # one chunk, logits the larger part
        pytest.param(48, 16, 9000, 2**30, marks=pytest.mark.long),
        (48, 16, 9000, 2**20),  # four
        # a few rows: the weight's gradient is all there is
        pytest.param(6, 64, 9000, 2**30, marks=pytest.mark.long),
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
