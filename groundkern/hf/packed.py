"""Packed rows, tried on a model: its samples have the losses that they have in a padded batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from groundkern.checks import require
from groundkern.hf.model.attach import attach, detach
from groundkern.hf.model.doctor import doctor
from groundkern.hf.model.modes import training_mode

NOISE = 10  # gradients may differ by so many times what hidden states may
FLOOR = 0.05  # of the largest gradient: one below it that is zero in truth is noise


def try_packing(
    model: nn.Module,
    padded: Mapping[str, Tensor],
    packed: Mapping[str, Tensor],
    objectives: Mapping[str, object],
    *,
    gradients: bool,
) -> None:
    """Compare the same samples in packed rows and padded.

    Args:
        model: a transformers model that is not attached, bare or inside PEFT.
        padded, packed: two batches of the same samples, on the model's device.
        objectives: to attach, by name.
        gradients: compare the gradients too; those that were there are dropped.

    Raises:
        ValueError: a model that is refused packed rows, or whose hidden states, losses or
            gradients are not the same.
    """
    attach(model, **objectives)
    try:
        tolerance = doctor(model, dict(packed)).tolerance
        with training_mode(model), torch.set_grad_enabled(gradients):
            _compare(model, padded, packed, tolerance, gradients=gradients)
    finally:
        model.zero_grad()
        detach(model)


def _compare(
    model: nn.Module,
    padded: Mapping[str, Tensor],
    packed: Mapping[str, Tensor],
    tolerance: float,
    *,
    gradients: bool,
) -> None:
    wanted, grads = _run(model, padded, gradients=gradients)
    found, own = _run(model, packed, gradients=gradients)
    largest = max(abs(x) for x in wanted.values())
    for name, loss in wanted.items():
        off = abs(found[name] - loss)
        _require(off <= tolerance * largest, f"`{name}`", f"{found[name]} instead of {loss}")
    most = max((float(x.abs().max()) for x in grads.values()), default=0.0)
    for name, gradient in grads.items():
        scale = max(float(gradient.abs().max()), FLOOR * most)
        off = float((own[name] - gradient).abs().max())
        alike = off <= NOISE * tolerance * scale
        _require(alike, f"the gradient of {name}", f"{off / scale:.2e} of its largest entry off")


def _require(alike: bool, what: str, got: str) -> None:
    require(alike, "packing", f"{what} as in the padded batch", got)


def _run(
    model: nn.Module, batch: Mapping[str, Tensor], *, gradients: bool
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The loss and its parts, and the gradients if asked for."""
    model.zero_grad()
    output = model(**batch)
    if gradients:
        output.loss.backward()
    losses = {"loss": output.loss, **output.parts}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: float(x.detach()) for name, x in losses.items()}, grads
