"""A few random calls in Triton's interpreter; and the harness finds what is broken. Thousands:
`python -m tests.ops.random_calls`."""

import pytest
import torch

from groundkern import available_backends
from groundkern.ops.attention_map import reference as map_reference
from groundkern.ops.side_attention import reference as side_reference
from tests.ops.random_calls import checking, drawing, losses
from tests.ops.random_calls.__main__ import main

SEED = 2026
FEW = range(24)  # about 10 s


@pytest.mark.parametrize("first", FEW[::6])
def test_triton_on_random_calls(first: int) -> None:
    for number in range(first, first + 6):
        drawn = drawing.draw(SEED, number, small=True)
        found = checking.wrong(drawn, "triton", twice=number % 3 == 0)
        assert not found, f"call {number}: {found}, {drawn.kind} {drawn.notes}"


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_the_loss_on_random_calls(backend: str) -> None:
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    for number in range(12):
        drawn = losses.draw(SEED, number, small=True)
        found = losses.wrong(drawn, backend, twice=number % 3 == 0)
        assert not found, f"call {number}: {found}, {drawn.kind} {drawn.notes}"


def test_a_call_is_made_from_its_seed_and_number() -> None:
    one, again, other = (drawing.draw(SEED, n) for n in (3, 3, 4))
    assert torch.equal(one.inputs["q"], again.inputs["q"])
    assert one.notes == again.notes != other.notes


def _first_row_doubled(results):
    results[0][:1] *= 2
    return results


def _dk_lost(gradients):
    gradients[1][:] = 0
    return gradients


def _dq_slightly_wrong(gradients):
    gradients[0].mul_(1.01)
    return gradients


def _never_the_same(gradients):
    gradients[0].add_(torch.rand(()) * 1e-12)
    return gradients


def _unwritten(gradients):
    gradients[1][:, :, :1] = torch.empty(())
    return gradients


BROKEN = [
    (side_reference, "side", "forward", _first_row_doubled),
    (side_reference, "side", "backward", _dk_lost),
    (side_reference, "side", "backward", _dq_slightly_wrong),
    (side_reference, "side", "backward", _never_the_same),
    (side_reference, "side", "backward", _unwritten),
    (map_reference, "map", "backward", _dk_lost),
    (map_reference, "kl", "backward", _dq_slightly_wrong),
    (map_reference, "contribution", "backward", _unwritten),
]


@pytest.mark.parametrize(
    ("module", "op", "direction", "damage"),
    BROKEN,
    ids=[f"{op}-{damage.__name__.strip('_')}" for _, op, _, damage in BROKEN],
)
def test_what_is_broken_is_found(module, op, direction, damage, monkeypatch, capsys) -> None:
    arguments = ["--backend", "reference", "--op", op, "--calls", "12", "--twice", "1"]
    assert main(arguments) == 0
    right = getattr(module, direction)
    monkeypatch.setattr(module, direction, lambda *x: damage(right(*x)))
    capsys.readouterr()
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"FAILED --seed 0 --op {op} --backend reference --only " in printed
