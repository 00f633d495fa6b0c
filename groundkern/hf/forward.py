"""The grounded forward: one run of the body, the head on counted rows only, the attached losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundkern.hf.body import BodyOutput, attribute, run_body
from groundkern.hf.call import Call
from groundkern.hf.head import IGNORED, RowScores, Smoothing, score_rows
from groundkern.hf.objectives import Objectives
from groundkern.hf.output import GroundedOutput
from groundkern.hf.supervision import take_rows, tokens_after, word_images
from groundkern.hf.terms import losses_of


def grounded_forward(model: nn.Module, objectives: Objectives, inputs: dict) -> GroundedOutput:
    """Losses and readings of a batch with `gk_` tensors.

    Args:
        model: the attached model itself, without wrappers.
        objectives: what to train; in eval mode everything that the batch has rows for is computed.
        inputs: the model's keyword inputs, the `gk_` tensors of `GroundedBatch`, and optionally
            `num_items_in_batch` (the text denominator), `gk_totals` int64 [K] (`row_counts` of the
            whole accumulated batch) and `gk_record`: one or several of
            "maps", "contributions", "gradcam", "logits" and "layers" (maps by layer).

    Raises:
        ValueError, TypeError: bad supervision, or inputs that the wiring does not support.
    """
    call = Call.of(model, objectives, inputs)
    body = run_body(call)
    scores = _score(call, body)
    loss, parts = losses_of(call, body, scores)
    text, word, terms, records = scores["text"], scores["word"], call.terms, call.records
    aligned = take_rows(body.hidden, call.s.side_position)
    return GroundedOutput(
        loss=loss,
        parts={name: part.detach() for name, part in parts.items()},
        text_log_prob=text.log_prob,
        text_predicted=text.predicted,
        word_log_prob=word.log_prob if terms.dv_sft is not None else None,
        word_predicted=word.predicted if terms.dv_sft is not None else None,
        side_log_prob=scores["side"].log_prob if terms.smam is not None else None,
        maps=_mean_map(call, body) if "maps" in records else None,
        contributions=attribute(call, body, "contributions")
        if "contributions" in records
        else None,
        gradcam=attribute(call, body, "gradcam") if "gradcam" in records else None,
        main_logits=_logits(call, aligned) if "logits" in records else None,
        side_logits=_logits(call, body.side_hidden) if "logits" in records else None,
    )


def _score(call: Call, body: BodyOutput) -> dict[str, RowScores]:
    """Every counted row through the head in one call; scores [B, R] by group.

    The groups: "text", "word", "reference" (log pi of the aligned rows), "side" (log pi+ of the
    same tokens), "phrase" and "lens".
    """
    s, terms = call.s, call.terms
    none = s.side_position[:, :0]
    side = s.side_position if body.side_hidden.shape[1] else none
    word = s.word_position if terms.dv_sft is not None else none
    label = torch.where(word >= 0, s.word_label[:, : word.shape[1]].long(), IGNORED)
    aligned = tokens_after(call.input_ids, side)
    phrase = s.phrase_position if terms.hist is not None else none
    lens = s.lens_position if terms.logit_lens is not None else none
    concept = torch.where(lens >= 0, s.lens_label[:, : lens.shape[1]].long(), IGNORED)
    groups = {  # hidden [B, R, D], target [B, R], bag [B, R]
        "text": (
            take_rows(body.hidden, s.text_position),
            tokens_after(call.input_ids, s.text_position),
        ),
        "word": (take_rows(body.hidden, word), label),
        "reference": (take_rows(body.hidden, side), aligned),
        "side": (body.side_hidden, aligned),
        "phrase": (take_rows(body.hidden, phrase), tokens_after(call.input_ids, phrase)),
        "lens": (take_rows(body.hidden, lens), concept),
    }
    bags = [torch.full_like(target, -1) for _, target in groups.values()]
    if word.shape[1]:
        bags[1] = word_images(s)
    scores = score_rows(
        call.head,
        torch.cat([hidden.flatten(0, 1) for hidden, _ in groups.values()]),
        torch.cat([target.flatten() for _, target in groups.values()]),
        smoothing=Smoothing(
            s.word_bag.flatten(0, 1),
            torch.cat([bag.flatten() for bag in bags]),
            0.0 if terms.dv_sft is None else terms.dv_sft.smoothing,
        ),
        softcap=call.softcap,
        backend=terms.backend,
    )
    sizes = [target.numel() for _, target in groups.values()]
    split = zip(*(x.split(sizes) for x in scores), strict=True)
    return {
        name: RowScores(*(x.view(target.shape) for x in group))
        for (name, (_, target)), group in zip(groups.items(), split, strict=True)
    }


def _mean_map(call: Call, body: BodyOutput) -> Tensor:
    """[B, Rm, C]: the mean over layers of the recorded maps; [B, Rm, L, C] by layer."""
    shape = (*call.s.map_position.shape, call.layer_count, call.s.map_columns.shape[1])
    if body.readings.maps is None:  # no rows or no visual tokens
        maps = call.denominators.new_zeros(shape)
    else:
        maps = torch.stack(body.readings.maps.layers, 1).view(shape)
    return maps if "layers" in call.records else maps.mean(2)


def _logits(call: Call, hidden: Tensor) -> Tensor:
    logits = call.head(hidden).detach().float()
    return logits if call.softcap is None else call.softcap * (logits / call.softcap).tanh()
