"""Heads as trainers have them (LoRA, tied to the embedding, sharded over processes), and the budget
of logits."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from groundkern import (
    available_backends,
    linear_cross_entropy,
    logit_budget,
    row_blocks,
    set_logit_budget,
)
from groundkern.row_blocks import logit_chunks

BACKENDS = [name for name, why in available_backends().items() if why is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
ROWS, DIM, VOCABULARY = 9, 24, 97


def _problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], target [N] with an ignored row."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, DIM, generator=draw)
    weight = torch.randn(VOCABULARY, DIM, generator=draw) * DIM**-0.5
    target = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    target[3] = -100
    return hidden, weight, target


def _same(ours: Tensor, plain: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Losses, and gradients against an uneven upstream."""
    torch.testing.assert_close(ours, plain)
    upstream = torch.linspace(0.5, 2.0, ours.numel()).view(ours.shape)
    pairs = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (ours, plain))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend
@each_reduction
def test_a_head_with_lora(backend: str, reduction: str) -> None:
    """W + s B A with W frozen: gradients reach A and B alone."""
    hidden, base, target = _problem()
    hidden.requires_grad_()
    down, up = (
        torch.randn(4, DIM, requires_grad=True),
        torch.randn(VOCABULARY, 4, requires_grad=True),
    )
    weight = base + 0.5 * up @ down
    ours = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend).loss
    logits = hidden @ base.T + 0.5 * (hidden @ down.T) @ up.T  # as PEFT computes it
    plain = F.cross_entropy(logits, target, reduction=reduction)
    _same(ours, plain, (hidden, down, up))
    assert not base.requires_grad


@each_backend
@each_reduction
def test_a_head_tied_to_the_embedding(backend: str, reduction: str) -> None:
    """One parameter, read by the embedding and by the head, gets the gradients of both."""
    _, table, target = _problem()
    table.requires_grad_()
    ids = torch.randint(VOCABULARY, (ROWS,))
    mix = torch.randn(DIM, DIM) * DIM**-0.5
    hidden = (F.embedding(ids, table) @ mix).tanh()
    ours = linear_cross_entropy(hidden, table, target, reduction=reduction, backend=backend).loss
    plain = F.cross_entropy(hidden @ table.T, target, reduction=reduction)
    _same(ours, plain, (table,))


def _sharded(rank: int, store: str, results) -> None:
    """(loss, gathered gradient) by backend and by how the head is passed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = _problem()
    head = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    found = {}
    for backend in BACKENDS:
        with pytest.raises(TypeError, match=r"`weight`: expected a plain tensor.*got a DTensor"):
            linear_cross_entropy(hidden, head, target, backend=backend)
        ways = {"gathered": (head.full_tensor(), None)}
        if backend != "native":  # it refuses groups
            ways["local rows"] = (head.to_local(), mesh.get_group())
        for way, (rows, group) in ways.items():
            head.grad = None
            loss = linear_cross_entropy(hidden, rows, target, group=group, backend=backend).loss
            loss.backward()
            assert head.grad.placements == (Shard(0),)
            found[backend, way] = [loss.detach(), head.grad.full_tensor()]
    results[rank] = found
    dist.destroy_process_group()


@pytest.mark.long
def test_a_head_sharded_as_a_dtensor(tmp_path) -> None:
    """Gathered, or as its local rows, it gives on both ranks what one process computes; a DTensor
    itself is refused, and the message says what to do."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_sharded, (str(tmp_path / "store"), results), nprocs=2)
        ranks = [results[0], results[1]]
    hidden, weight, target = _problem()
    weight.requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, target)
    loss.backward()
    for found in ranks:
        assert {way for _, way in found} == {"gathered", "local rows"}
        for got in found.values():
            torch.testing.assert_close(got, [loss.detach(), weight.grad])


@pytest.fixture
def budget():
    """Sets the budget for one test."""
    yield set_logit_budget
    set_logit_budget(None)


def test_the_budget_is_of_the_whole_process_and_read_when_a_call_runs(budget) -> None:
    assert logit_budget() is None
    default = logit_chunks(64, VOCABULARY, 4, 2**30)
    budget(VOCABULARY * 4 * 10)
    assert logit_budget() == VOCABULARY * 40
    assert len(default) == 1 and len(logit_chunks(64, VOCABULARY, 4, 2**30)) == 7
    seen = []
    thread = threading.Thread(target=lambda: seen.append(logit_budget()))  # like autograd's
    thread.start()
    thread.join()
    assert seen == [VOCABULARY * 40]
    budget(None)
    assert logit_chunks(64, VOCABULARY, 4, 2**30) == default


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_budget_changes_chunks_and_no_result(backend: str, budget, monkeypatch) -> None:
    """Compiled with one budget and run with another."""
    hidden, weight, target = _problem()
    hidden.requires_grad_(), weight.requires_grad_()
    counts: list[int] = []
    cut = row_blocks.logit_chunks
    leaf = {"native": "native_kernels", "triton": "triton_launch"}[backend]
    module = f"groundkern.ops.linear_cross_entropy.{leaf}.logit_chunks"

    def counted(*arguments, **options) -> list[slice]:
        chunks = cut(*arguments, **options)
        counts.append(len(chunks))
        return chunks

    monkeypatch.setattr(module, counted)
    torch._dynamo.reset()
    run = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = run(hidden, weight, target, backend=backend).loss
    assert set(counts) <= {1}, "one chunk, or none if the logits are saved"
    budget(VOCABULARY * 8 * 2)
    got = run(hidden, weight, target, backend=backend).loss
    assert counts[-1] > 1
    _same(got, expected, (hidden, weight))


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "1 GB"])
def test_a_budget_is_a_number_of_bytes(size) -> None:
    with pytest.raises(ValueError, match="`size`: expected a positive number of bytes or None"):
        set_logit_budget(size)
