"""Large CPU buffers are reused, but never while a view of them is alive."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

from groundkern import available_backends, buffers, linear_cross_entropy

SIZE = 4 * 2**20


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buffers, "SMALLEST", SIZE)
    gc.collect()
    buffers.release()
    yield
    buffers.release()


def empty(size: int = SIZE) -> torch.Tensor:
    return buffers.empty(size, dtype=torch.uint8)


def test_memory_is_reused_once_its_last_view_is_gone() -> None:
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
def test_a_gradient_that_autograd_returned_is_not_reused() -> None:
    hidden = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(20_000, 64, requires_grad=True)  # its gradient: over 4 MiB
    target = torch.randint(20_000, (64,))
    wanted, returned = [], []
    for seed in range(3):
        upstream = torch.tensor(seed + 0.5)
        loss = linear_cross_entropy(hidden, weight, target, backend="native").loss
        returned.append(torch.autograd.grad(loss, [hidden, weight], upstream)[1])
        wanted.append(returned[-1].clone())
    assert len({x.data_ptr() for x in returned}) == 3
    assert all(torch.equal(a, b) for a, b in zip(returned, wanted, strict=True))
    torch.testing.assert_close(returned[1], 3 * returned[0])


def test_only_a_block_of_about_the_size_is_reused() -> None:
    x = empty(3 * SIZE)
    address = x.data_ptr()
    del x
    small, large, fitting = empty(), empty(4 * SIZE), empty(2 * SIZE)
    assert address not in (small.data_ptr(), large.data_ptr())
    assert fitting.data_ptr() == address


def test_small_buffers_come_from_torch() -> None:
    x = buffers.empty(SIZE - 1, dtype=torch.uint8)
    assert x.untyped_storage().resizable()
    del x
    assert not buffers._pool
    assert buffers.empty(0, 7, dtype=torch.float32).shape == (0, 7)


def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "POOLED_AT_MOST", 5 * SIZE)
    many = [empty((1 + i % 2) * SIZE) for i in range(8)]
    many.clear()
    assert 0 < sum(map(len, buffers._pool)) <= 5 * SIZE
    buffers.release()
    assert not buffers._pool


def test_a_block_larger_than_the_pool_evicts_nothing(monkeypatch) -> None:
    monkeypatch.setattr(buffers, "POOLED_AT_MOST", 3 * SIZE)
    small, large = empty(), empty(4 * SIZE)
    del small
    del large
    assert [len(block) for block in buffers._pool] == [SIZE]


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


def test_it_copies_and_saves_like_any_tensor(tmp_path) -> None:
    x = empty().fill_(3)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(copy.deepcopy(x), x)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), x)


def test_too_large_a_buffer_is_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        buffers.empty(2**62, dtype=torch.uint8)
