"""BASIC's weights and directions, patch-text contrast: cases computed by hand, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from groundkern.token_losses import contrast, direction, teacher_weights


def test_later_layers_teach_more():
    assert teacher_weights(1) == [1.0]
    assert teacher_weights(3) == [1 / 14, 4 / 14, 9 / 14]  # 1 + 4 + 9 = 14
    with pytest.raises(ValueError, match="`depth`: expected at least one layer"):
        teacher_weights(0)


def test_directions_by_hand():
    """(1, 0) against (1, 1): 2 - 2 cos 45 degrees; lengths do not count; opposite is 4."""
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 5.0]], requires_grad=True)
    rows = direction(student, teacher)
    wanted = torch.tensor([2 - math.sqrt(2), 0.0, 4.0, 1.0])
    torch.testing.assert_close(rows, wanted)
    rows.mul(torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert teacher.grad is None
    # d(2 - 2 u.t)/dv = -2 (t - (t.u) u) / |v|, with u = (1, 0) and t = (1, 1) / sqrt 2
    torch.testing.assert_close(student.grad[0], torch.tensor([0.0, -math.sqrt(2)]))
    assert not student.grad[1:].any()


def test_direction_gradients_and_small_angles():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: direction(x, teacher), student.requires_grad_())
    close = student.detach() * (1 + 1e-9) + 1e-6 * teacher
    cosine = torch.nn.functional.cosine_similarity(student, close, dim=-1)
    torch.testing.assert_close(direction(student, close), 2 - 2 * cosine, rtol=1e-3, atol=0)


def test_contrast_by_hand():
    """Two words, exp of their logits 3 and 1: the first has 3/4. A row on both regions shares."""
    logits = torch.tensor([[math.log(3), 0.0, 9.0]] * 4, requires_grad=True)
    match = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    valid = torch.tensor([[True, True, False]] * 4)
    rows = contrast(logits, match, valid)
    own, other = -math.log(3 / 4), -math.log(1 / 4)
    wanted = torch.tensor([own, other, (own + other) / 2, 0.0])
    torch.testing.assert_close(rows, wanted)
    rows.mul(torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    gradient = torch.tensor([[-1 / 4, 1 / 4, 0], [7.5, -7.5, 0], [25.0, -25.0, 0], [0, 0, 0]])
    torch.testing.assert_close(logits.grad, gradient)
    # at tau = 1/2 the weights are squared: 9 and 1
    sharp = contrast(logits, match, valid, temperature=0.5)[:2]
    torch.testing.assert_close(sharp, -torch.tensor([0.9, 0.1]).log())


def test_contrast_of_what_is_not_there():
    nothing = torch.full((2, 2), torch.nan, requires_grad=True)
    none = torch.zeros(2, 2, dtype=torch.bool)
    rows = contrast(nothing, ~none, none)
    rows.sum().backward()
    assert not rows.any()
    assert not nothing.grad.any()
    empty = none.new_zeros(3, 0)
    assert contrast(torch.zeros(3, 0), empty, empty).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="`match`: expected the shape of `logits`"):
        contrast(torch.zeros(2, 3), none, none)
    with pytest.raises(ValueError, match="`temperature`: expected a number above 0, got 0"):
        contrast(torch.zeros(2, 2), none, none, temperature=0.0)
