"""Comparing gradients of whole models."""

from __future__ import annotations

from torch import Tensor, nn


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; the model's own .grad is left empty."""
    loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], wanted: dict[str, Tensor], share=1e-5) -> None:
    """Each gradient within `share` of its largest entry, or of a twentieth of the model's largest.

    The floor is there for what is zero in truth and noise in floats: without RoPE, a key bias
    shifts all scores of a row alike.
    """
    assert ours.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 0.05 * largest)
        difference = float((ours[name] - gradient).abs().max())
        assert difference <= share * scale, f"{name}: {difference} of {scale}"
