"""Large CPU buffers: reused, and never while somebody still looks at them."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

from groundkern import available_backends, buffers, linear_cross_entropy

SIZE = 4 * 2**20


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buffers, "SMALLEST", SIZE)
    gc.collect()
    buffers.release()
    yield
    buffers.release()


def empty(size: int = SIZE) -> torch.Tensor:
    return buffers.empty(size, dtype=torch.uint8)


def test_the_memory_serves_again_once_the_last_view_is_gone() -> None:
    x = buffers.empty(SIZE // 8, 4, dtype=torch.bfloat16)
    assert x.shape == (SIZE // 8, 4) and x.dtype == torch.bfloat16 and x.is_contiguous()
    address, view = x.data_ptr(), x[3:].t()
    view.fill_(1.5)
    del x
    other = empty()
    assert other.data_ptr() != address
    other.fill_(0)
    assert (view == 1.5).all()
    del view
    assert empty().data_ptr() == address


@pytest.mark.skipif(
    available_backends()["native"] is not None, reason="groundkern._C is not built: no C++ compiler"
)
def test_what_autograd_handed_out_is_not_taken_back() -> None:
    hidden = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(20_000, 64, requires_grad=True)  # its gradient: over 4 MiB
    target = torch.randint(20_000, (64,))
    wanted, kept = [], []
    for seed in range(3):
        upstream = torch.tensor(seed + 0.5)
        loss = linear_cross_entropy(hidden, weight, target, backend="native").loss
        kept.append(torch.autograd.grad(loss, [hidden, weight], upstream)[1])
        wanted.append(kept[-1].clone())
    assert len({x.data_ptr() for x in kept}) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    torch.testing.assert_close(kept[1], 3 * kept[0])


def test_only_a_block_of_about_the_size_is_taken() -> None:
    x = empty(3 * SIZE)
    address = x.data_ptr()
    del x
    small, large, fitting = empty(), empty(4 * SIZE), empty(2 * SIZE)
    assert address not in (small.data_ptr(), large.data_ptr())
    assert fitting.data_ptr() == address


def test_small_buffers_are_torchs() -> None:
    x = buffers.empty(SIZE - 1, dtype=torch.uint8)
    assert x.untyped_storage().resizable()
    del x
    assert not buffers._waiting
    assert buffers.empty(0, 7, dtype=torch.float32).shape == (0, 7)


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_AT_MOST", 5 * SIZE)
    many = [empty((1 + i % 2) * SIZE) for i in range(8)]
    many.clear()
    assert 0 < sum(map(len, buffers._waiting)) <= 5 * SIZE
    buffers.release()
    assert not buffers._waiting


def test_what_is_larger_than_all_that_may_wait_puts_nothing_out(monkeypatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_AT_MOST", 3 * SIZE)
    small, large = empty(), empty(4 * SIZE)
    del small
    del large
    assert [len(block) for block in buffers._waiting] == [SIZE]


def test_threads_never_share_a_block() -> None:
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(200):
            x = empty()
            x[:: SIZE // 64] = mark
            if not (x[:: SIZE // 64] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_copies_and_saves_as_any_tensor(tmp_path) -> None:
    x = empty().fill_(3)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(copy.deepcopy(x), x)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), x)


def test_memory_that_is_not_there_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        buffers.empty(2**62, dtype=torch.uint8)
