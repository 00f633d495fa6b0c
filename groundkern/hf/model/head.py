"""Scores of a few rows under the model's own output head, without full logits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import LabelBags, SoftTargets, linear_cross_entropy
from groundkern.checks import fail
from groundkern.losses import word_cross_entropy

IGNORED = -100


class RowScores(NamedTuple):
    """Cross entropy and prediction of each row; an ignored row has 0, 0 and -1."""

    loss: Tensor  # [N] fp32, differentiable and smoothed
    log_prob: Tensor  # [N] fp32
    predicted: Tensor  # [N] int64


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
    softcap: float | None,
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
        softcap: of the logits; None: off.
        backend: of `linear_cross_entropy`.

    Returns:
        RowScores of [N] rows.
    """
    if type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        return _scores_of_logits(head(hidden), target, smoothing, several, softcap)
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
            bias=head.bias,
            bags=bags,
            smoothing=0.0 if bags is None else smoothing.share,
            reduction="none",
            ignore_index=IGNORED,
            softcap=softcap,
            backend=backend,
        )
        return scores.loss, scores.log_prob, scores.predicted

    with _forward_replaced(head, fused):
        return RowScores(*head(hidden))


class LogitRule(NamedTuple):
    """What a model's forward does with its head's output: `softcap(logits * scale)`."""

    scale: float
    softcap: float | None


def logit_rule(model: nn.Module) -> LogitRule:
    """The logit post-processing of a model, read from its class's forward.

    The config alone does not tell: Gemma3's vision model has no softcap and Aya Vision no scale,
    although their text configs name one. `doctor` measures any other difference.

    Raises:
        ValueError: a scale on a head with a bias, a class without source.
    """
    config, source = model.config.get_text_config(), _forward_source(type(model))
    softcap = scale = None
    if "final_logit_softcapping" in source:
        softcap = getattr(config, "final_logit_softcapping", None)
    if "logit_scale" in source:
        scale = config.logit_scale
    elif "logits_scaling" in source:
        scale = config.logits_scaling
        if not re.search(
            r"\* *[\w.]*logits_scaling", source
        ):  # Granite divides, HyperCLOVAX does not
            scale = 1.0 / scale
    elif "output_multiplier" in source:
        scale = config.output_multiplier
    if scale is not None and getattr(model.get_output_embeddings(), "bias", None) is not None:
        fail("model", "a head without bias where logits are scaled", type(model).__name__)
    return LogitRule(1.0 if scale is None else float(scale), softcap)


class Forbidding(nn.Module):
    """A head some of whose ids the model's forward forbids, by giving them the lowest logit.

    Args:
        head: the output embeddings.
        ids: int64 [K], forbidden.
    """

    def __init__(self, head: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.head, self.ids = head, ids

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        return logits.index_fill(-1, self.ids.to(x.device), torch.finfo(logits.dtype).min)


def head_of(model: nn.Module) -> nn.Module:
    """The head as a model's own forward uses it: Chameleon's forbids the codes of images.

    Args:
        model: an attached model, without wrappers.

    Returns:
        Its output embeddings, alone or in `Forbidding`.
    """
    head = model.get_output_embeddings()
    if "vocabulary_mapping.image_tokens" not in _forward_source(type(model)):
        return head
    return Forbidding(head, torch.tensor(model.base_model.vocabulary_mapping.image_tokens))


@cache
def _forward_source(model_class: type[nn.Module]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(model_class.forward))
    except OSError:  # a class typed into a prompt
        fail("model", "a class whose forward has its source in a file", model_class.__name__)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
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


def _scores_of_logits(
    logits: Tensor,
    target: Tensor,
    smoothing: Smoothing,
    several: Several | None,
    softcap: float | None,
) -> RowScores:
    """The same scores in plain torch, from stored logits [N, V] of these rows only."""
    logits = soft_capped(logits.float(), softcap)
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


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`; None: the logits as they are."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def unembedding(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """[N, D]: d logit[target] / d hidden, the head's row of each target for any affine head."""
    with torch.inference_mode(False), torch.enable_grad():
        x = hidden.detach().clone().requires_grad_()
        chosen = head(x).gather(1, target.clamp(min=0)[:, None])
        return torch.autograd.grad(chosen.sum(), x)[0]
