"""The grounded forward: one run of the body, the head on counted rows only, the attached losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern.hf.model.body import BodyOutput, run_body
from groundkern.hf.model.context import Split
from groundkern.hf.model.head import (
    IGNORED,
    RowScores,
    Several,
    Smoothing,
    TokenScores,
    score_rows,
    score_tokens,
)
from groundkern.hf.model.lesson import teach
from groundkern.hf.model.records import records_of
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import take_rows, tokens_after, word_images
from groundkern.hf.model.teacher import Teacher
from groundkern.hf.model.terms import losses_of
from groundkern.hf.objectives import Objectives
from groundkern.hf.output import GroundedOutput
from groundkern.parallel.collectives import summed


def grounded_forward(
    model: nn.Module, objectives: Objectives, inputs: dict, teacher: Teacher | None = None
) -> GroundedOutput:
    """Losses and per-row readings of a batch with `gk_` tensors.

    Args:
        model: the attached model itself, without wrappers.
        objectives: what to train; in eval mode everything that the batch has rows for is computed.
        inputs: the model's keyword inputs, the `gk_` tensors of the batch, and optionally
            `num_items_in_batch` (the text denominator), `gk_totals` int64 [K] (`row_counts` of the
            whole accumulated batch) and `gk_record`: one or several of
            "maps", "klal" (the map that it compares), "heads" (maps of every head),
            "contributions", "gradcam", "logits", "policy", "layers" (maps by layer) and "visible"
            (maps over all that a row sees). `gk_part` names one part of the loss, which then is
            that part alone, with its weight.
            `gk_temperature`, a number, is for a loss of the text that the caller makes, such as a
            policy's: the loss is that of the objectives alone, and the text tokens' log
            probabilities and entropies at that temperature carry gradients.
        teacher: of the objective `distill`.

    Returns:
        GroundedOutput.

    Raises:
        ValueError, TypeError: bad supervision, or inputs that the wiring does not support.
    """
    request = Request.of(model, objectives, inputs)
    body = run_body(request, teach(request, teacher))
    groups = _groups(request, body)
    tokens = None if request.temperature is None else _tokens(request, groups.pop("text"))
    scores = _score(request, groups)
    loss, parts = losses_of(request, body, scores)
    parts = {name: part.detach() for name, part in parts.items()}
    if request.split is not None:
        loss, parts = _of_all_ranks(loss, parts, request.split)
        scores = {name: _rows_of_all(rows, request.split) for name, rows in scores.items()}
    word, side, text = scores.get("word"), scores.get("side"), tokens or scores["text"]
    return GroundedOutput(
        loss=loss,
        parts=parts,
        text_log_prob=text.log_prob,
        text_predicted=text.predicted,
        text_entropy=None if tokens is None else tokens.entropy,
        word_log_prob=None if word is None else word.log_prob,
        word_predicted=None if word is None else word.predicted,
        side_log_prob=None if side is None else side.log_prob,
        **records_of(request, body),
    )


class _Group(NamedTuple):
    """Rows that one term scores."""

    hidden: Tensor  # [B, R, D]
    target: Tensor  # [B, R], -100 for padding
    bag: Tensor  # [B, R], the label bag of a row; -1: none


def _groups(request: Request, body: BodyOutput) -> dict[str, _Group]:
    """The rows that the terms score, by name.

    "reference" is log pi of the aligned rows and "side" log pi+ of the same tokens.
    """
    batch, terms, split = request.batch, request.terms, request.split

    def here(position: Tensor) -> Tensor:
        return position if split is None else split.local(position)

    def group(hidden: Tensor, target: Tensor, bag: Tensor | None = None) -> _Group:
        return _Group(hidden, target, torch.full_like(target, -1) if bag is None else bag)

    def next_tokens(position: Tensor) -> _Group:
        at, target = here(position), tokens_after(request.input_ids, position)
        return group(take_rows(body.hidden, at), torch.where(at >= 0, target, IGNORED))

    def labels(position: Tensor, label: Tensor, bag: Tensor | None = None) -> _Group:
        at = here(position)
        label = torch.where(at >= 0, label.long(), IGNORED)
        return group(take_rows(body.hidden, at), label, bag)

    found = {"text": next_tokens(batch.text_position)}
    if terms.dv_sft is not None:
        found["word"] = labels(batch.word_position, batch.word_label, word_images(batch))
    if terms.smam is not None:
        found["reference"] = next_tokens(batch.side_position)
        found["side"] = group(body.side_hidden, found["reference"].target)
    if terms.hist is not None:
        found["phrase"] = next_tokens(batch.phrase_position)
    if terms.logit_lens is not None:
        found["lens"] = labels(batch.lens_position, batch.lens_label)
    return found


def _tokens(request: Request, text: _Group) -> TokenScores:
    """[B, Rt] of the text tokens, with gradients."""
    found = score_tokens(
        request.head,
        text.hidden.flatten(0, 1),
        text.target.flatten(),
        temperature=request.temperature,
        rule=request.logit_rule,
        backend=request.terms.backend,
    )
    return TokenScores(*(x.view(text.target.shape) for x in found))


def _score(request: Request, groups: dict[str, _Group]) -> dict[str, RowScores]:
    """Scores [B, R] by group: every counted row goes through the head in one call."""
    dv_sft = request.terms.dv_sft
    if not groups:
        return {}
    hidden = torch.cat([group.hidden.flatten(0, 1) for group in groups.values()])
    target = torch.cat([group.target.flatten() for group in groups.values()])
    bag = torch.cat([group.bag.flatten() for group in groups.values()])
    share = 0.0 if dv_sft is None else dv_sft.smoothing
    scores = score_rows(
        request.head,
        hidden,
        target,
        smoothing=Smoothing(request.batch.word_bag.flatten(0, 1), bag, share),
        several=_several(request, groups),
        rule=request.logit_rule,
        backend=request.terms.backend,
    )
    sizes = [group.target.numel() for group in groups.values()]
    split = zip(*(x.split(sizes) for x in scores), strict=True)
    return {
        name: RowScores(*(x.view(group.target.shape) for x in rows))
        for (name, group), rows in zip(groups.items(), split, strict=True)
    }


def _of_all_ranks(loss: Tensor, parts: dict[str, Tensor], split: Split) -> tuple[Tensor, dict]:
    """The loss with the value of all ranks and the gradient of this one's part, and the parts."""
    known = torch.stack([loss.detach(), *parts.values()])
    whole, *others = summed(known, split.shard).unbind()
    return loss + (whole - loss.detach()), dict(zip(parts, others, strict=True))


def _rows_of_all(rows: RowScores, split: Split) -> RowScores:
    """Scores of the rows of all ranks, without a gradient; each has 0, 0 and -1 for others'."""
    numbers = torch.stack((rows.loss, rows.log_prob)).detach()
    loss, log_prob = summed(numbers, split.shard)
    predicted = summed(rows.predicted + 1, split.shard) - 1
    return RowScores(loss, log_prob, predicted)


def _several(request: Request, groups: dict[str, _Group]) -> Several | None:
    """The labels of visual tokens that have more than one, among all rows; None: none has."""
    batch = request.batch
    if "word" not in groups or batch.several_label.shape[-1] == 0:
        return None

    def of_rows(x: Tensor) -> Tensor:
        own = {"word": x.flatten(0, 1)}
        rows = [
            own[name] if name in own else x.new_full((group.target.numel(), x.shape[-1]), -1)
            for name, group in groups.items()
        ]
        return torch.cat(rows)

    return Several(of_rows(batch.several_label), of_rows(batch.several_weight))
