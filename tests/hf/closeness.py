"""Comparing losses and gradients of whole models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; the model's own .grad is left empty."""
    loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_losses(ours, naive) -> None:
    """The loss and every part of a `GroundedOutput` against those of a `NaiveOutput`."""
    torch.testing.assert_close(ours.loss, naive.loss, rtol=1e-5, atol=0)
    for name, part in naive.parts.items():
        torch.testing.assert_close(ours.parts[name], part.detach(), rtol=2e-5, atol=0)


def assert_differ_in_attention(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """The gradients of every projection of a middle layer's attention differ by over 0.1 %."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        key = next(k for k in ours if k.endswith(f"layers.1.self_attn.{name}.weight"))
        difference = (ours[key] - others[key]).abs().max() / ours[key].abs().max()
        assert float(difference) > 1e-3, name


def assert_same_gradients(ours: dict[str, Tensor], wanted: dict[str, Tensor], share=1e-5) -> None:
    """Each gradient within `share` of its largest entry, or of a twentieth of the model's largest.

    The floor is for gradients that are zero in truth and noise in floats: without RoPE, a key bias
    shifts all scores of a row alike.
    """
    assert ours.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 0.05 * largest)
        difference = float((ours[name] - gradient).abs().max())
        assert difference <= share * scale, f"{name}: {difference} of {scale}"
