"""GradCAM maps of a decoder's attention, differentiable: A * relu(dy/dA), summed over heads.

dy/dA of a head is v . g with g = dy/d(attention output), so the map is `attention_contribution`
with `rectify`. g comes from autograd with a graph of its own (`create_graph=True`). A loss on the
map then differentiates the layers above twice, which flash attention, sdpa and fused losses cannot
do: y is made of plain logits, and the model must run eager attention. That costs [S, S] memory,
since eager attention stores its weights and the graph of the first backward lives on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import attention_contribution
from groundkern.checks import fail
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import Rows, take_rows, tokens_after
from groundkern.hf.model.sharded import sharded


class SavedLayers:
    """A reading: the attention layers of one run, in their graph."""

    uses_lse = alike = False

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def rows_in(self, number: int) -> None:
        """None."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Save one layer."""
        run.refuse_lost_graph("GradCAM")
        if not run.finished:
            if not layer.out.requires_grad:  # nothing below is trainable
                layer.out.requires_grad_()
            self.layers.append(layer)


class GradcamRun(NamedTuple):
    """The run that GradCAM explains."""

    hidden: Tensor  # [B, S, D], last hidden states
    layers: list[Layer]


def gradcam_terms(request: Request) -> tuple[str, ...]:
    """The objectives of a request that use GradCAM; none when gradients are off."""
    return request.terms.gradcam if torch.is_grad_enabled() else ()


def refuse_sharded(model: nn.Module) -> None:
    """Raise for weights that hooks gather: they are gone by the second backward pass.

    Raises:
        ValueError: FSDP or ZeRO-3.
    """
    if sharded(model):
        wanted = "whole weights on every rank (one process, or DDP) with GradCAM"
        fail("model", wanted, "FSDP or ZeRO-3 shards")


def gradcam_maps(
    request: Request,
    run: GradcamRun,
    position: Tensor,
    group: Tensor,
    *,
    groups: int,
    layers: tuple[int, ...] | None,
) -> Tensor:
    """GradCAM of rows on the map columns, the mean of heads and layers.

    The rows of one group of a sample explain one y: the sum of the log probabilities of the tokens
    they predict. One backward per group number, shared by the samples of the batch.

    Args:
        request: the request.
        run: the run to explain.
        position, group: [B, R] rows and the group of each, from 0; -1: padding.
        groups: how many group numbers there are.
        layers: those that count; None: all.

    Returns:
        [B, R, C], differentiable: `mean over layers, heads of A * relu(v . g)`, A over all visible
        keys.

    Source: arXiv 2412.08110 (H3), with the map of (C1).
    """
    columns, hidden = request.batch.map_columns.int(), run.hidden
    shape = (*position.shape, columns.shape[1])
    if 0 in shape:
        return hidden.new_zeros(shape)
    counted = [layer for layer in run.layers if layers is None or layer.number in layers]
    log_prob = _log_prob(request, hidden, position)  # [B, R]
    outs = [layer.out for layer in counted]
    total = torch.zeros((), device=hidden.device)
    for number in range(groups):
        chosen = (group == number) & (position >= 0)
        y = log_prob.masked_fill(~chosen, 0.0).sum()
        gradients = torch.autograd.grad(y, outs, create_graph=True)
        rows = request.rows(torch.where(chosen, position, -1))
        for layer, g in zip(counted, gradients, strict=True):
            total = total + _contribution(rows, layer, g, columns)
    heads = counted[0].q.shape[1]
    return total.expand(position.numel(), columns.shape[1]).view(shape) / (len(counted) * heads)


def _contribution(rows: Rows, layer: Layer, g: Tensor, columns: Tensor) -> Tensor:
    at = rows.at(layer.window)
    g = at.take(g.transpose(1, 2)).to(layer.v.dtype)  # [N, H, D]
    options = {"over": "visible", "rectify": True, "lse": layer.normaliser(rows), **layer.options}
    q = at.take(layer.q)
    return attention_contribution(q, layer.k, layer.v, g, at, columns, **options)


def _log_prob(request: Request, hidden: Tensor, position: Tensor) -> Tensor:
    """[B, R]: of the tokens that the rows predict, in operations that differentiate twice."""
    logits = request.head(take_rows(hidden, position))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = request.logit_rule.of(logits).log_softmax(-1)
    target = tokens_after(request.input_ids, position).clamp(min=0)
    return log_probs.gather(-1, target[..., None])[..., 0]


def group_means(maps: Tensor, group: Tensor, groups: int) -> Tensor:
    """[B, groups, C]: the mean of the rows' maps [B, R, C] of each group (H3); -1: no group."""
    member = torch.arange(groups, device=group.device)[:, None] == group[:, None]  # [B, groups, R]
    member = member.to(maps.dtype)
    return member @ maps / member.sum(-1, keepdim=True).clamp(min=1)
