"""A layer's ops, its rows and its main pass's gradients as one node: what they are apart."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern import KeySets, asked, available_backends
from groundkern.beside import OfRows, ask_beside, take_beside
from groundkern.hf import Hist, Klal, Margins, Smam, attach
from groundkern.hf.model import attention
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.rows import Rows
from groundkern.taken import Places
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.samples import SAMPLES, make_batch

BACKENDS = [name for name, why in available_backends().items() if why is None]
LENGTH, SIDE = 19, 3
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_total = pytest.mark.parametrize("total", [LENGTH, LENGTH + SIDE], ids=["alone", "side tokens"])
Inputs = tuple[Tensor, Tensor, Tensor]


def _rows(*position: tuple[int, ...]) -> Rows:
    positions = torch.tensor(position)
    return Rows(positions, torch.zeros(positions.shape, dtype=torch.int32))


# One place twice, padding, and a selection that two ops read.
SIDE_ROWS, MAP_ROWS = _rows((4, 4, 18), (11, -1, 2)), _rows((17, 9), (6, 18))
SELECTIONS = (SIDE_ROWS, MAP_ROWS)
COLUMNS = torch.tensor([[0, 2, 3, 7, 8], [1, 4, 6, 10, -1]], dtype=torch.int32)
TARGET = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) + 0.1
MEMBERS = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
SETS = KeySets.from_bool(MEMBERS, torch.arange(6, dtype=torch.int32))


def _inputs(total: int) -> Inputs:
    """[B, H, T, D] as projections lay them."""
    draw = torch.Generator().manual_seed(total)
    shapes = (2, total, 4, 16), (2, total, 2, 16), (2, total, 2, 24)
    drawn = (torch.randn(shape, generator=draw) for shape in shapes)
    return tuple(x.transpose(1, 2).requires_grad_() for x in drawn)


def _asked(k: Tensor, v: Tensor, taken: dict, backend: str) -> list[asked.Asked]:
    side, of_map = SIDE_ROWS.at(None), MAP_ROWS.at(None)
    q, own = taken[SIDE_ROWS], taken[MAP_ROWS]
    options = {"backend": backend}
    return [
        asked.side_attention(q, k, v, side, allowed=SETS, **options),
        asked.attention_kl(own, k, TARGET, of_map, COLUMNS, over="columns", **options),
        asked.attention_map(own, k, of_map, COLUMNS, over="visible", **options),
    ]


def _places(inputs: Inputs, backend: str) -> Places:
    return Places(SELECTIONS, inputs[0].shape[2], triton=backend == "triton")


def _apart(inputs: Inputs, backend: str) -> list[Tensor]:
    """What the main pass is given, and the results."""
    q, k, v, own_k, own_v, taken = take_beside(*inputs, LENGTH, _places(inputs, backend))
    found = asked.run(_asked(own_k, own_v, taken, backend))
    return [q, k, v, *(x for results in found for x in results)]


@torch.no_grad()
def _calls(inputs: Inputs, places: Places, backend: str) -> list[OfRows]:
    q, k, v = (x.detach()[:, :, :LENGTH] for x in inputs)
    numbers = (0, 1, 1)
    found = _asked(k, v, places.taken(q), backend)
    return [OfRows.of(number, each) for number, each in zip(numbers, found, strict=True)]


def _beside(inputs: Inputs, backend: str) -> list[Tensor]:
    places = _places(inputs, backend)
    main, answers = ask_beside(_calls(inputs, places, backend), places, LENGTH, *inputs)
    return [*main, *(x for results in answers for x in results)]


RESULTS = 7  # q, k, v; out and lse of side attention; a KL; a map
USED = [used for used in product((0, 1), repeat=RESULTS) if sum(used) in (1, 2, RESULTS)]


def _upstream(results: list[Tensor]) -> list[Tensor]:
    """Uneven, and of other strides than the results."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(x.transpose(0, -1).shape, generator=draw).transpose(0, -1) for x in results]


def _gradients(results: list[Tensor], inputs: Inputs, used: tuple[int, ...], **options):
    pairs = zip(results, _upstream(results), used, strict=True)
    results, above = zip(*[(x, dx) for x, dx, counted in pairs if counted], strict=True)
    return torch.autograd.grad(
        results, inputs, above, retain_graph=True, materialize_grads=True, **options
    )


@each_backend
@each_total
def test_results_and_gradients_are_those_apart(total: int, backend: str) -> None:
    """Whichever results have a gradient; the same bits twice."""
    inputs = _inputs(total)
    results, wanted = _beside(inputs, backend), _apart(inputs, backend)
    assert all(map(torch.equal, results, wanted))
    for used in USED if backend != "triton" else USED[-1:]:  # the interpreter is slow
        found = _gradients(results, inputs, used)
        torch.testing.assert_close(
            found, _gradients(wanted, inputs, used), rtol=1e-5, atol=1e-5, msg=str(used)
        )
        assert all(map(torch.equal, found, _gradients(results, inputs, used)))


@each_total
@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)], ids=str)
def test_keys_and_values_without_a_gradient(total: int, frozen: tuple[int, ...]) -> None:
    inputs = _inputs(total)
    for number in frozen:
        inputs[number].requires_grad_(False)
    results, wanted = _beside(inputs, "reference"), _apart(inputs, "reference")
    assert [x.requires_grad for x in results] == [x.requires_grad for x in wanted]
    trained = tuple(x for x in inputs if x.requires_grad)
    used = tuple(int(x.requires_grad) for x in results)
    found, wanted = (_gradients(x, trained, used) for x in (results, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@each_backend
@each_total
def test_hooks_may_lay_saved_tensors_otherwise(total: int, backend: str) -> None:
    inputs = _inputs(total)
    wanted = _gradients(_beside(inputs, backend), inputs, (1,) * RESULTS)
    with saved_tensors_hooks(
        lambda x: x.transpose(0, -1).contiguous(), lambda x: x.transpose(0, -1)
    ):
        results = _beside(inputs, backend)
    found = _gradients(results, inputs, (1,) * RESULTS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@each_total
@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "triton"])
def test_batched_gradients(total: int, backend: str) -> None:
    inputs = _inputs(total)
    results = _beside(inputs, backend)
    above = [torch.stack((dx, 2 * dx)) for dx in _upstream(results)]
    options = {"is_grads_batched": True, "retain_graph": True}
    found = torch.autograd.grad(results, inputs, above, **options)
    wanted = _gradients(_apart(inputs, backend), inputs, (1,) * RESULTS)
    for dx, once in zip(found, wanted, strict=True):
        torch.testing.assert_close(dx, torch.stack((once, 2 * once)), rtol=1e-5, atol=1e-5)


@each_total
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "queries alone"])
def test_ops_refuse_a_second_derivative(total: int, frozen: bool) -> None:
    """The main pass's tensors have one: they are views."""
    inputs = _inputs(total)
    inputs[1].requires_grad_(not frozen)
    inputs[2].requires_grad_(not frozen)
    trained = tuple(x for x in inputs if x.requires_grad)
    results = _beside(inputs, "reference")
    main = [x.sin().sum() for x in results[:3] if x.requires_grad]
    first = torch.autograd.grad(sum(main), trained, create_graph=True)
    for x, second in zip(
        trained, torch.autograd.grad(sum(map(torch.sum, first)), trained, retain_graph=True)
    ):
        wanted = -x.detach().sin()
        wanted[:, :, LENGTH:] = 0
        torch.testing.assert_close(second, wanted)
    for result in results[3:]:
        first = torch.autograd.grad(result.sum(), trained, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="backward"):
            sum(x.square().sum() for x in first if x is not None).backward(retain_graph=True)


@each_backend
@each_total
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(total: int, reentrant: bool, backend: str) -> None:
    inputs = _inputs(total)
    wanted = _gradients(_beside(inputs, backend), inputs, (1,) * RESULTS)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_beside(tensors, backend))

    results = checkpoint(run, *leaves, use_reentrant=reentrant)
    main = [x for x in results if x.requires_grad]
    torch.autograd.backward(main, _upstream(results)[: len(main)])
    assert all(torch.equal(x.grad, dx) for x, dx in zip(leaves, wanted, strict=True))


def test_a_selection_that_was_written_to_is_refused() -> None:
    inputs = _inputs(LENGTH)
    rows = _rows((3, 5), (4, 1))
    places = Places((rows,), LENGTH)
    with torch.no_grad():
        q, k, v = (x.detach() for x in inputs)
        call = asked.side_attention(places.taken(q)[rows], k, v, rows.at(None))
    _, ((out, _),) = ask_beside([OfRows.of(0, call)], places, LENGTH, *inputs)
    rows.at(None).tensors()[0].add_(0)
    with pytest.raises(RuntimeError, match="nothing is written to before the backward"):
        out.sum().backward()


class Counted:
    """Notes what an attention layer uses of `groundkern.beside`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asks = self.takes = 0
        monkeypatch.setattr(attention, "ask_beside", self.ask)
        monkeypatch.setattr(attention, "take_beside", self.take)

    def ask(self, *arguments):
        self.asks += 1
        return ask_beside(*arguments)

    def take(self, *arguments):
        self.takes += 1
        return take_beside(*arguments)


SIDE_TERM, MAP_TERM = {"smam": Smam()}, {"klal": Klal()}
ASKED = {
    "side tokens": SIDE_TERM,
    "a KL": MAP_TERM,
    "both": SIDE_TERM | MAP_TERM,
    "heads each": {"klal": Klal(heads="each")},
    "some layers": SIDE_TERM | {"klal": Klal(layers=(1,))},
    "the mean of layers": {"klal": Klal(average_layers=True)},
    "margins and phrases": {"margins": Margins(), "hist": Hist(), **MAP_TERM},
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("terms", ASKED.values(), ids=ASKED)
def test_a_model_asks_before_its_main_pass(terms: dict, checkpointed: bool, monkeypatch) -> None:
    """Every layer does, and it changes nothing."""
    model = attach(tiny_qwen_model(), **terms).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, SAMPLES["qwen"][:2])
    counted = Counted(monkeypatch)
    found = model(**batch)
    of_found, asks = gradients(model, found.loss), counted.asks
    assert asks > 0
    assert counted.takes == 0 or "layers" in str(terms)
    monkeypatch.setattr(BodyRun, "calls", lambda *_: None)
    apart = model(**batch)
    torch.testing.assert_close(found.loss, apart.loss)
    assert_same_gradients(of_found, gradients(model, apart.loss))
    assert counted.asks == asks and counted.takes >= asks


WAITING = {
    "a normaliser": {"klal": Klal(over="visible")},
    "picked heads": {"klal": Klal(picked_heads=2, average_layers=True)},
}


@pytest.mark.parametrize("terms", WAITING.values(), ids=WAITING)
def test_what_waits_for_the_main_pass_takes_its_rows(terms: dict, monkeypatch) -> None:
    model = attach(tiny_qwen_model(), **terms).train()
    counted = Counted(monkeypatch)
    model(**make_batch(model, SAMPLES["qwen"][:2])).loss.backward()
    assert counted.takes > 0
    assert counted.asks == 0


def test_without_a_gradient_there_is_no_node(monkeypatch) -> None:
    model = attach(tiny_qwen_model(), **SIDE_TERM, **MAP_TERM)
    counted = Counted(monkeypatch)
    with torch.no_grad():
        model(**make_batch(model, SAMPLES["qwen"][:2]))
    assert counted.takes > 0
    assert counted.asks == 0
