"""Held-out figures of a model, task by task, and the heat maps of the report's pictures.

Everything is teacher forced and, whatever a model was trained on, every objective is read, so that
plain fine-tuning and grounded runs are measured alike. A task without the rows
that a metric needs does not have it:

- `answer_loss`, `token_accuracy`: cross entropy and top-1 accuracy of the trained answer tokens.
- `answer_accuracy`: samples whose trained tokens are all right, which is what greedy decoding of
  these answers would write.
- `number_accuracy`: top-1 accuracy of the answer tokens that consist of digits only. Where an
  answer is a row and a column, this is the accuracy per coordinate.
- `attention_ratio`, `attention_mass`, `attention_argmax`: the attention map of the row that
  predicts the answer's last token (mean of layers and heads, normalised over the visual tokens)
  against the visual tokens of the region.
- `peak_in_mask`, `roc_auc`: logit contributions of the visual tokens to each aligned answer token
  against its region.
- `word_accuracy`, `word_baseline`: top-1 accuracy of the visual labels, of which any is right where
  a token has several, and that of always guessing the most frequent of them, the best that a
  constant guess can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern import metrics
from groundkern.hf.model.sharded import sharded
from groundkern.hf.watching.held_out import word_labels
from groundkern.maps import FIXED_POINT_ONE
from groundkern.trainer.collating import COUNTS
from groundkern.trainer.metrics.tally import Tally, row_of
from groundkern.trainer.progress import progress
from groundkern.trainer.ranks import Ranks

MEASURED = {
    "map_kind": "neighbours",
    "map_levels": (1.0, 0.5, 1e-3),
    "map_rows": "predictor",
    "empty_region": "skip",
}
"""Options of the collator that `evaluate` expects. Every model is measured against the same target
map, whatever map it was trained towards; the highest level marks the target itself. Figures made
with others are not put beside these (`how_measured`)."""

_ON_TARGET = 0.999 * FIXED_POINT_ONE


def evaluate(
    model: torch.nn.Module,
    collator: Callable,
    tasks: dict[str, list[int]],
    dataset: Any,
    *,
    digits: Tensor,
    batch_size: int,
    autocast: torch.dtype | None = None,
    title: str = "evaluating",
    ranks: Ranks | None = None,
    even: Callable[[dict], dict] | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task (named at the head of this file).

    Several processes take the batches of one in turn. All call the model equally often, as sharded
    weights need: one without a batch left takes its first one again, which counts nothing.

    Args:
        model: attached, on its device; left in evaluation mode.
        collator: examples to a batch; with the options `MEASURED`.
        tasks: sample indices of each task.
        dataset: map-style data set of `GroundedExample`.
        digits: bool [V], token ids that consist of digits (`digit_tokens`).
        batch_size: samples in a forward pass.
        autocast: the dtype that the model runs in; None: its weights' own.
        title: what the progress bar says.
        ranks: the processes that evaluate together; None: this one.
        even: given where weights are sharded: makes of a batch one with which all processes call
            the same modules (`EvenRanks.evaluated`).

    Returns:
        {task: {"samples": count, metric: mean, "per_sample": what `tally` makes of the samples}},
        the same in every process.
    """
    ranks = ranks or Ranks()
    model.eval()  # an attached model then computes every reading, whatever it is trained on
    results = {}
    with progress(title, total=sum(map(len, tasks.values())), unit="sample") as bar:
        for task, indices in tasks.items():
            tally, unused = Tally(len(indices)), Tally(len(indices))
            starts = range(0, len(indices), batch_size)
            for turn in range(0, len(starts), ranks.size):
                mine = turn + ranks.rank
                into, start = (tally, starts[mine]) if mine < len(starts) else (unused, 0)
                examples = [dataset[i] for i in indices[start : start + batch_size]]
                collated = collator(examples)
                kept = [start + row for row in rows_of(examples, collated)]
                into.begin(kept, (example.name for example in examples), start)
                aligned = has_aligned(collated)
                if even is not None:
                    collated, aligned = even(collated), bool(max(ranks.highest([aligned])))
                _measure(model, collated, into, digits, autocast, aligned)
                bar.update(min(len(indices), (turn + ranks.size) * batch_size) - turn * batch_size)
            whole = Tally.joined(ranks.gathered(tally, f"the figures of {task}"))
            results[task] = whole.figures(getattr(dataset, "digest", ""))
    return results


def _measure(
    model: torch.nn.Module,
    collated: dict,
    tally: Tally,
    digits: Tensor,
    autocast: torch.dtype | None,
    aligned: bool,
) -> None:
    """Adds every metric of a batch."""
    batch = to_device(collated, device_of(model))
    output, maps, contributions = read(model, batch, autocast=autocast, aligned=aligned)
    add_answers(tally, batch, output, digits)
    if maps is not None:
        add_attention(tally, batch, maps)
    if contributions is not None:
        add_contributions(tally, batch, contributions)
    add_words(tally, batch, output.word_predicted)


@torch.no_grad()
def read(
    model: torch.nn.Module, batch: dict, *, autocast: torch.dtype | None, aligned: bool
) -> tuple[Any, Tensor | None, Tensor | None]:
    """(output, attention maps [B, Rm, C], contributions [B, Rs, C]); None if no row needs them.

    aligned: whether a batch has aligned rows: this one, or on sharded weights that of any process.
    """
    with torch.autocast(device_of(model).type, autocast, enabled=autocast is not None):
        output = model(**batch, gk_record=("maps", "contributions") if aligned else "maps")
    contributions = output.contributions if aligned else None
    return output, output.maps, contributions


def has_aligned(batch: dict) -> bool:
    """Whether a batch has rows of aligned tokens."""
    return batch["gk_side_position"].shape[1] > 0


def how_measured() -> dict[str, Any]:
    """`MEASURED` as JSON has it, to be kept beside figures."""
    return {**MEASURED, "map_levels": [*MEASURED["map_levels"]]}


def add_answers(tally: Tally, batch: dict, output: Any, digits: Tensor | None = None) -> None:
    """answer_loss and the accuracies of tokens, answers and numbers in the answer rows [B, Rt].

    digits: of `digit_tokens`; None: no accuracy of numbers.
    """
    position = batch["gk_text_position"].long()
    rows = position >= 0
    target = batch["labels"].gather(1, (position + 1).clamp_min(0))[rows]  # row t predicts t + 1
    right, row = output.text_predicted[rows] == target, row_of(rows)
    tally.add("answer_loss", -output.text_log_prob[rows], row)
    tally.add("token_accuracy", right, row)
    wrong, answered = torch.zeros_like(rows).masked_scatter(rows, ~right), rows.any(1)
    tally.add("answer_accuracy", ~wrong.any(1)[answered], torch.nonzero(answered)[:, 0])
    if digits is not None:
        number = digits.to(target.device)[target]
        tally.add("number_accuracy", right[number], row[number])


def add_attention(tally: Tally, batch: dict, maps: Tensor) -> None:
    """attention_ratio, attention_mass and attention_argmax of the map rows [B, Rm, C]."""
    rows = batch["gk_map_position"] >= 0
    scores, target = maps[rows], target_columns(batch)[rows]
    valid, row = own_columns(batch)[rows], row_of(rows)
    tally.add("attention_ratio", metrics.attention_ratio(scores, target, valid), row)
    tally.add("attention_mass", metrics.mass_on_target(scores, target, valid), row)
    tally.add("attention_argmax", metrics.argmax_in_target(scores, target, valid), row)


def add_contributions(tally: Tally, batch: dict, contributions: Tensor) -> None:
    """peak_in_mask and roc_auc of the aligned rows [B, Rs, C]."""
    rows = batch["gk_side_position"] >= 0
    scores, target = contributions[rows], region_columns(batch)[rows]
    valid = (batch["gk_map_columns"] >= 0)[:, None].expand_as(contributions)[rows]
    tally.add("peak_in_mask", metrics.peak_in_mask(scores, target, valid), row_of(rows))
    tally.add("roc_auc", metrics.roc_auc(scores, target, valid), row_of(rows))


def add_words(tally: Tally, batch: dict, predicted: Tensor) -> None:
    """word_accuracy and word_baseline of the labelled visual tokens [B, Rw]: any label is right."""
    rows = batch["gk_word_position"] >= 0
    tally.add_words(predicted[rows], word_labels(batch)[rows], row_of(rows))


def rows_of(examples: Sequence[Any], batch: dict) -> list[int]:
    """Which example each row of a batch is; a collator that skips bad ones has named them.

    Where none was good, the rows are a stand-in's, which has nothing to learn: all are 0 here.
    """
    bad = {found.where for found in batch.get(COUNTS, {}).get("bad", ())}
    kept = [row for row, example in enumerate(examples) if example.name not in bad]
    rows = len(batch["labels"])
    return kept if len(kept) == rows else [0] * rows


def own_columns(batch: dict) -> Tensor:
    """Bool [B, Rm, C]: the key columns of each map row's own image."""
    columns = batch["gk_map_columns"].long()  # [B, C]
    image = batch["gk_image"].gather(1, columns.clamp_min(0))
    same_image = image[:, None, :] == batch["gk_map_image"][:, :, None]
    return same_image & (columns >= 0)[:, None, :]


def target_columns(batch: dict) -> Tensor:
    """Bool [B, Rm, C]: the key columns on each map row's target."""
    return batch["gk_map_target"] >= _ON_TARGET


def region_columns(batch: dict) -> Tensor:
    """Bool [B, Rs, C]: the key columns inside each aligned row's region."""
    columns, sets = batch["gk_map_columns"].long(), batch["gk_side_set"].long()
    inside = batch["gk_side_inside"]  # [B, G, S]
    at = columns.clamp_min(0)[:, None, :].expand(-1, inside.shape[1], -1)
    inside = inside.gather(2, at) & (columns >= 0)[:, None, :]  # [B, G, C]
    return inside.gather(1, sets.clamp_min(0)[:, :, None].expand(-1, -1, columns.shape[1]))


def digit_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Bool [vocabulary]: the token ids whose text is digits only, blanks aside."""
    texts = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
    digits = torch.zeros(vocabulary, dtype=torch.bool)
    digits[: len(texts)] = torch.tensor([text.strip().isdigit() for text in texts])
    return digits


def pick(tasks: list[str], limit: int | None) -> dict[str, list[int]]:
    """{task: indices of its first `limit` samples}, given the task of each sample."""
    picked: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        indices = picked.setdefault(task, [])
        if limit is None or len(indices) < limit:
            indices.append(index)
    return picked


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes: parts of weights may lie in the host's memory."""
    if torch.accelerator.is_available() and sharded(model):
        return torch.accelerator.current_accelerator()
    return model.device


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch on `device`."""
    return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
