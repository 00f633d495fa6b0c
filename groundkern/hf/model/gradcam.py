"""GradCAM maps of a decoder's attention, differentiable: A * relu(dy/dA), summed over heads.

dy/dA of a head is v . g with g = dy/d(attention output), so the map is `attention_contribution`
with `rectify`. g comes from autograd with a graph of its own (`create_graph=True`): a loss on the
map differentiates the layers above twice, which flash and sdpa attention and fused losses cannot
do. So y is made of plain logits, and the model must run eager attention. No [S, S] promise here:
eager attention stores its weights, and the graph of the first backward is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import attention_contribution
from groundkern.checks import fail
from groundkern.hf.model.attention import LAYER, Record
from groundkern.hf.model.request import Call
from groundkern.hf.supervision import Rows, take_rows, tokens_after


class Layer(NamedTuple):
    """One layer of the run that is explained."""

    number: int
    q: Tensor  # [B, Hq, S, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    out: Tensor  # [B, S, Hq, Dv], what g is the gradient of
    window: int | None
    how: dict


class Explained:
    """The layers of one run, in their graph."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def keep(self, record: Record, module: nn.Module, q, k, v, out, window, how: dict) -> None:
        """Keep one layer.

        Raises:
            ValueError: reentrant checkpointing, which runs layers without a graph.
        """
        if not torch.is_grad_enabled():
            wanted = "use_reentrant=False: reentrant checkpointing drops the gradient of GradCAM"
            fail("gradient_checkpointing_kwargs", wanted, "use_reentrant=True")
        if record.open:
            if not out.requires_grad:  # nothing below is trainable
                out.requires_grad_()
            self.layers.append(Layer(module.__dict__[LAYER], q, k, v, out, window, how))


def gradcam_terms(call: Call) -> tuple[str, ...]:
    """The objectives of a call that need GradCAM; none without gradients to make it of."""
    return call.terms.gradcam if torch.is_grad_enabled() else ()


def refuse_fused(attention: str) -> None:
    """Raise unless attention is plain mathematics, which differentiates twice.

    Raises:
        ValueError: flash, sdpa or flex attention.
    """
    if attention != "eager":
        wanted = "eager: GradCAM losses differentiate twice, which flash and sdpa attention cannot"
        fail("attn_implementation", wanted, attention)


def refuse_sharded(model: nn.Module) -> None:
    """Raise for weights that hooks gather: they are not there in the second derivative.

    Raises:
        ValueError: FSDP or ZeRO-3.
    """
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()):
        wanted = "whole weights on every rank (one process, or DDP) with GradCAM losses"
        fail("model", wanted, "FSDP or ZeRO-3 shards")


def gradcam_maps(
    call: Call,
    hidden: Tensor,
    explained: Explained,
    position: Tensor,
    group: Tensor,
    groups: int,
    layers: tuple[int, ...] | None,
) -> Tensor:
    """GradCAM of rows on the map columns, the mean of heads and layers.

    The rows of one group of a sample explain one y: the sum of the log probabilities of the tokens
    they predict. One backward per group number, shared by the samples of the batch.

    Args:
        call: the grounded call.
        hidden: [B, S, D] last hidden states of the run that `explained` recorded.
        explained: its layers.
        position, group: [B, R] rows and the group of each, from 0; -1: padding.
        groups: how many group numbers there are.
        layers: those that count; None: all.

    Returns:
        [B, R, C], differentiable: `mean over layers, heads of A * relu(v . g)`, A over all visible
        keys.

    Source: METHODS.md sections 4 and 6, (H3) and (C1).
    """
    columns = call.s.map_columns.int()
    shape = (*position.shape, columns.shape[1])
    if 0 in shape:
        return hidden.new_zeros(shape)
    counted = [layer for layer in explained.layers if layers is None or layer.number in layers]
    log_prob = _log_prob(call, hidden, position)  # [B, R]
    outs = [layer.out for layer in counted]
    total = torch.zeros((), device=hidden.device)
    for number in range(groups):
        chosen = (group == number) & (position >= 0)
        y = log_prob.masked_fill(~chosen, 0.0).sum()
        gradients = torch.autograd.grad(y, outs, create_graph=True)
        rows = call.rows(torch.where(chosen, position, -1))
        for layer, g in zip(counted, gradients, strict=True):
            total = total + _contribution(rows, layer, g, columns)
    heads = counted[0].q.shape[1]
    return total.expand(position.numel(), columns.shape[1]).view(shape) / (len(counted) * heads)


def _contribution(rows: Rows, layer: Layer, g: Tensor, columns: Tensor) -> Tensor:
    at = rows.at(layer.window)
    g = at.take(g.transpose(1, 2)).to(layer.v.dtype)  # [N, H, D]
    q, k, v = at.take(layer.q), layer.k, layer.v
    return attention_contribution(
        q, k, v, g, at, columns, over="visible", rectify=True, **layer.how
    )


def _log_prob(call: Call, hidden: Tensor, position: Tensor) -> Tensor:
    """[B, R]: of the tokens that the rows predict, in operations that differentiate twice."""
    logits = call.head(take_rows(hidden, position))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    target = tokens_after(call.input_ids, position).clamp(min=0)
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def group_means(maps: Tensor, group: Tensor, groups: int) -> Tensor:
    """[B, groups, C]: the mean of the rows' maps [B, R, C] of each group (H3); -1: no group."""
    member = torch.arange(groups, device=group.device)[:, None] == group[:, None]  # [B, groups, R]
    member = member.to(maps.dtype)
    return member @ maps / member.sum(-1, keepdim=True).clamp(min=1)
