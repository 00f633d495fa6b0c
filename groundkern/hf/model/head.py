"""Scores of a few rows under the model's own output head, without full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import LabelBags, SoftTargets, linear_cross_entropy, linear_log_prob
from groundkern.hf.model.logit_rule import LogitRule, soft_capped
from groundkern.losses import word_cross_entropy
from groundkern.precision import accumulation_dtype

IGNORED = -100


class RowScores(NamedTuple):
    """Cross entropy and prediction of each row; an ignored row has 0, 0 and -1."""

    loss: Tensor  # [N] fp32, differentiable and smoothed
    log_prob: Tensor  # [N] fp32
    predicted: Tensor  # [N] int64


class TokenScores(NamedTuple):
    """What a policy's tokens are scored by; an ignored row has 0, 0 and -1."""

    log_prob: Tensor  # [N] fp32, differentiable
    entropy: Tensor  # [N] fp32, differentiable
    predicted: Tensor  # [N] int64


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear layer as torch has it, whose weight may take part in an op."""
    return type(head).forward is nn.Linear.forward and "forward" not in head.__dict__


class Smoothing(NamedTuple):
    """The label bags of (D3): ids [G, Y] padded with -1, the rows' bags [N] (-1: none), and b."""

    ids: Tensor
    index: Tensor
    share: float


class Several(NamedTuple):
    """All labels of the rows that have more than one (D5): ids [N, L] padded with -1, and what each
    counts for, integers above 0; a row without any has its target alone."""

    ids: Tensor
    weight: Tensor


def score_rows(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    *,
    smoothing: Smoothing,
    several: Several | None = None,
    rule: LogitRule,
    backend: str,
) -> RowScores:
    """Cross entropy of rows under the head.

    A plain linear head is called once with its forward replaced by the fused op: logits are never
    stored, and hooks that gather a sharded weight run as usual. Any other head (LoRA, quantised,
    a forward of its own) is called on the rows.

    Args:
        head: the model's output embeddings.
        hidden: [N, D] last hidden states.
        target: int64 [N], whose log-probability is returned; -100 marks a row that is not counted.
        smoothing: the labels that share a part of each row's loss.
        several: the labels of rows that have more than one; None: no row has.
        rule: what becomes of the logits; its scale is in `hidden` already.
        backend: of `linear_cross_entropy`.

    Returns:
        RowScores of [N] rows.
    """
    if not is_plain(head):
        return _scores_of_logits(rule.of(head(hidden).float()), target, smoothing, several)
    labels: Tensor | SoftTargets = target
    bags: LabelBags | None = None
    if several is None:
        bags = ragged_bags(smoothing.ids, smoothing.index)
    else:
        labels = soft_targets(target, smoothing, several)

    def fused(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = linear_cross_entropy(
            x,
            head.weight,
            labels,
            bias=offset_bias(head, rule),
            bags=bags,
            smoothing=0.0 if bags is None else smoothing.share,
            reduction="none",
            ignore_index=IGNORED,
            softcap=rule.softcap,
            backend=backend,
        )
        return scores.loss, scores.log_prob, scores.predicted

    with forward_replaced(head, fused):
        return RowScores(*head(hidden))


def score_tokens(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    *,
    temperature: float,
    rule: LogitRule,
    backend: str,
) -> TokenScores:
    """Log probability of each row's token, and the entropy of the row, at a temperature.

    Args:
        head, hidden, target, rule, backend: as in `score_rows`.
        temperature: what logits are divided by, behind the rule.

    Returns:
        TokenScores of [N] rows.

    Source: (E3).
    """
    counted = target != IGNORED
    if is_plain(head):

        def fused(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found = linear_log_prob(
                x,
                head.weight,
                target,
                bias=offset_bias(head, rule),
                softcap=rule.softcap,
                temperature=temperature,
                ignore_index=IGNORED,
                entropy=True,
                backend=backend,
            )
            return found.log_prob, found.entropy, found.predicted

        with forward_replaced(head, fused):
            return TokenScores(*head(hidden))
    logits = rule.of(head(hidden).float()) / temperature
    log_probs = logits.log_softmax(-1)  # [N, V]
    log_prob = log_probs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return TokenScores(
        log_prob.masked_fill(~counted, 0.0),
        entropy.masked_fill(~counted, 0.0),
        logits.argmax(-1).masked_fill(~counted, -1),
    )


def word_logits(head: nn.Module, hidden: Tensor, words: Tensor, rule: LogitRule) -> Tensor:
    """Logits of a few words of each sample.

    A plain linear head's rows of these words are read alone; any other head is called on the
    hidden states, as in `score_rows`.

    Args:
        head: the model's output embeddings.
        hidden: [B, R, D] last hidden states.
        words: int64 [B, W] token ids; of padding (below 0) the logit means nothing.
        rule: what becomes of the logits; its scale is in `hidden` already.

    Returns:
        fp32 [B, R, W], differentiable.
    """
    ids = words.clamp(min=0)
    wide = accumulation_dtype(hidden.dtype)
    if not is_plain(head):
        logits = rule.of(head(hidden).to(wide))
        return logits.gather(2, ids[:, None].expand(-1, hidden.shape[1], -1))

    def chosen(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = x.to(wide) @ head.weight[ids].to(wide).mT
            if head.bias is not None:
                logits = logits + head.bias[ids][:, None].to(wide)
            logits = soft_capped(logits, rule.softcap)
        offset = rule.offset
        return logits if offset is None else logits + offset.to(x.device)[ids][:, None]

    with forward_replaced(head, chosen):
        return head(hidden)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within the block a module's forward is another; its hooks run as usual."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def ragged_bags(ids: Tensor, index: Tensor) -> LabelBags:
    """Padded bags [G, Y] as ragged ones, without a sync: padding becomes spare ids at the end."""
    valid = ids >= 0
    order = (~valid).flatten().to(torch.int8).argsort(stable=True)
    flat = ids.flatten().clamp(min=0).long()[order]
    offsets = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))
    return LabelBags(flat, offsets, index)


def soft_targets(target: Tensor, smoothing: Smoothing, several: Several) -> SoftTargets:
    """The labels of rows, and those of their images that share the loss, with probabilities.

    Args:
        target: int64 [N], -100 for a row that is not counted.
        smoothing: (D2)'s bags and share.
        several: the labels of rows that have more than one.

    Returns:
        [N, L + Y] ids, of which -100 is padding.

    Source: (D5).
    """
    own, weight = several.ids.long(), several.weight.float()  # [N, L]
    weight = torch.where(own >= 0, weight, 0.0)
    alone = (weight.sum(1) <= 0)[:, None]
    first = torch.arange(own.shape[1], device=own.device) == 0
    own = torch.where(alone, torch.where(first, target[:, None], -1), own)
    weight = torch.where(alone, first.float(), weight)
    bag = own.new_empty((len(own), 0))
    if smoothing.ids.numel():
        bag = smoothing.ids.long()[smoothing.index.clamp(min=0)]  # [N, Y]
        bag = torch.where((smoothing.index >= 0)[:, None], bag, -1)
    for label in own.unbind(1):
        bag = torch.where(bag == label[:, None], -1, bag)
    others = (bag >= 0).sum(1, keepdim=True)
    share = torch.where(others > 0, smoothing.share, 0.0)
    probabilities = torch.cat(
        (
            (1 - share) * weight / weight.sum(1, keepdim=True),
            (share / others.clamp(min=1)).expand(bag.shape),
        ),
        dim=1,
    )
    ids = torch.cat((own, bag), dim=1)
    padding = (ids < 0) | (target == IGNORED)[:, None]
    return SoftTargets(
        ids.masked_fill(padding, IGNORED), probabilities.masked_fill(padding, 0.0), target
    )


def offset_bias(head: nn.Module, rule: LogitRule) -> Tensor | None:
    """[V]: the head's bias and the rule's offset, which has no softcap."""
    if rule.offset is None:
        return head.bias
    dtype = head.weight.dtype  # in fp16 the offset would be infinite
    offset = rule.offset.clamp(min=torch.finfo(dtype).min / 2).to(head.weight.device, dtype)
    return offset if head.bias is None else head.bias + offset


def _scores_of_logits(
    logits: Tensor, target: Tensor, smoothing: Smoothing, several: Several | None
) -> RowScores:
    """The same scores in plain torch, from stored logits [N, V] of these rows only."""
    log_probs = logits.log_softmax(-1)  # [N, V]
    counted = target != IGNORED
    label = target.clamp(min=0)
    log_prob = log_probs.gather(1, label[:, None])[:, 0]
    loss = -log_prob
    if several is not None:
        soft = soft_targets(target, smoothing, several)
        loss = -(soft.probabilities * log_probs.gather(1, soft.ids.clamp(min=0))).sum(1)  # (D5)
    elif smoothing.ids.numel():
        ids = smoothing.ids.long()[smoothing.index.clamp(min=0)]  # [N, Y]
        others = (ids >= 0) & (ids != label[:, None]) & (smoothing.index >= 0)[:, None]
        has_others = others.any(1)
        other = log_probs.gather(1, ids.clamp(min=0)).masked_fill(~others, 0.0).sum(1)
        other = other / others.sum(1).clamp(min=1)
        loss = word_cross_entropy(log_prob, other, has_others, smoothing=smoothing.share)  # (D3)
    zero = loss.new_zeros(())
    return RowScores(
        torch.where(counted, loss, zero),
        torch.where(counted, log_prob, zero).detach(),
        torch.where(counted, logits.argmax(-1), -1),
    )


def unembedding(head: Callable, hidden: Tensor, target: Tensor) -> Tensor:
    """[N, D]: d logit[target] / d hidden, the head's row of each target for any affine head."""
    with torch.inference_mode(False), torch.enable_grad():
        x = hidden.detach().clone().requires_grad_()
        chosen = head(x).gather(1, target.clamp(min=0)[:, None])
        return torch.autograd.grad(chosen.sum(), x)[0]
