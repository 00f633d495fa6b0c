"""One curve: held-out answers right after every so many steps; continued where it was stopped.

A loop of its own and not the Trainer's: batches are rows of one tensor and there is no logging of a
step. The order of drawings follows from the seed and the step alone and no module draws random
numbers, so weights, optimizer and points are all that a continued curve needs to have the same bits
as one that was never stopped.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.hf import attach, row_counts
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError, Objectives
from groundkern.trainer.evidence.drawings import Whole, rows
from groundkern.trainer.evidence.plan import Method, Study
from groundkern.trainer.metrics import held_out
from groundkern.trainer.metrics.tally import Tally

SATURATED, PATIENCE = 0.99, 3  # a curve ends after so many points of at least so much
LOOKS = ("attention_mass", "attention_argmax", "word_accuracy")  # of the end of a curve
_WAIT = 30.0  # seconds between two saved states
_BATCH = 64  # of an evaluation


@dataclass
class Curve:
    """What a curve's training needs: model, drawings and where it is kept.

    Args:
        study, method, seed: see `plan`.
        model: at its start, without objectives.
        train, test: `drawings.Whole` of the method and of the held-out drawings.
        state: the file of weights, optimizer and points while it is not done.
        settings: kept in that file, which is of another curve if it has others.
        ends: the accuracy at which it ends early (for a pretrained start), or None.
    """

    study: Study
    method: Method
    seed: int
    model: nn.Module
    train: Whole
    test: Whole
    state: Path
    settings: dict[str, Any]
    ends: float | None = None

    def run(self, steps: int) -> dict[str, Any]:
        """Train to `steps`, or to where the curve ends.

        Returns:
            {"points": a list of {"step", "accuracy", "loss", ...}, "seconds", "at_end": figures of
            where the trained model looks}; of clips with "map" (`first_map`).

        Raises:
            ConfigError: what is kept is of other settings.
        """
        study, model = self.study, self.model
        attach(model, **dict(Objectives(**self.method.objectives)))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=study.learning_rate, weight_decay=0.01, fused=True
        )
        step, points, spent = self._restore(optimizer)
        position = {name: positions(model, whole) for name, whole in self._sets()}
        text = {k: v for k, v in self.test.items() if k[:3] != "gk_" or k == "gk_text_position"}
        if not points:
            points.append({"step": 0, **answers(model, text, position["test"])})
        started = saved = time.monotonic()
        while step < steps and not self.ended(points):
            self._step(optimizer, step, position["train"])
            step += 1
            if step % study.every and step != steps:
                continue
            points.append({"step": step, **answers(model, text, position["test"])})
            now = time.monotonic()
            if now - saved > _WAIT:
                self._save(optimizer, step, points, spent + now - started)
                saved = now
        spent += time.monotonic() - started
        self._save(optimizer, step, points, spent)
        looks = where_it_looks(model, self.test, position["test"])
        made = {"points": points, "seconds": round(spent, 1), "at_end": looks}
        return made | {"map": first_map(model, self.test)} if "video_grid_thw" in text else made

    def ended(self, points: list[dict]) -> bool:
        """Whether the last points are as good as a curve gets, or as a start should be."""
        last = [point["accuracy"] for point in points]
        if self.ends is not None:
            return last[-1] >= self.ends
        return len(last) >= PATIENCE and min(last[-PATIENCE:]) >= SATURATED

    def _sets(self) -> list[tuple[str, Whole]]:
        return [("train", self.train), ("test", self.test)]

    def _step(self, optimizer: torch.optim.Optimizer, step: int, position: Tensor | None) -> None:
        study, model = self.study, self.model
        model.train()
        index = picked(len(self.train["input_ids"]), study.batch_size, step, self.seed)
        batch = rows(self.train, index, position, model.device)
        model(**batch, gk_totals=row_counts(batch)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = study.learning_rate * min(1.0, (step + 1) / study.warmup)
        optimizer.step()
        optimizer.zero_grad()

    def _save(self, optimizer, step: int, points: list, seconds: float) -> None:
        buffer = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"settings": self.settings, "step": step, "points": points, "seconds": seconds}
        torch.save(state, buffer)
        durable.write_bytes(self.state, buffer.getvalue())

    def _restore(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict], float]:
        if not self.state.exists():
            return 0, [], 0.0
        kept = torch.load(self.state, weights_only=True, map_location=self.model.device)
        if kept["settings"] != self.settings:
            raise ConfigError(f"{self.state} is of other settings; choose another --output")
        self.model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        return kept["step"], kept["points"], kept["seconds"]


def picked(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The drawings of a step, int64 [B]: each epoch has an order of its own, from the seed."""
    each = max(1, count // batch)
    epoch, number = divmod(step, each)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[number * batch : (number + 1) * batch]


def positions(model: nn.Module, whole: Whole) -> Tensor | None:
    """int64 [3, N, S]: rotary positions, which the model would find again in every step.

    None for clips: in transformers 5.23 text begins before the last seconds of the clip that it
    stands behind, and positions that start again are refused, as those of packed rows.
    """
    if "video_grid_thw" in whole:
        return None
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    found, _ = model.model.get_rope_index(**{name: whole.get(name) for name in names})
    return found


@torch.no_grad()
def answers(model: nn.Module, whole: Whole, position: Tensor | None) -> dict[str, float]:
    """The share of answers that greedy decoding gets right, and the loss of their tokens.

    An answer is right if each of its tokens, its end included, is the likeliest after those before
    it, so that greedy decoding writes exactly it.
    """
    tally = Tally(len(whole["input_ids"]))
    for batch, output in _read(model, whole, position, tally):
        held_out.add_answers(tally, batch, output)
    found = tally.figures()
    return {"accuracy": found["answer_accuracy"], "loss": found["answer_loss"]}


@torch.no_grad()
def where_it_looks(model: nn.Module, whole: Whole, position: Tensor | None) -> dict[str, float]:
    """Attention of the row that predicts the answer, and the visual labels, of held-out drawings.

    Returns:
        "attention_mass" and "attention_argmax" on the target, "word_accuracy": of those that the
        drawings have.
    """
    tally = Tally(len(whole["input_ids"]))
    for batch, output in _read(model, whole, position, tally, gk_record="maps"):
        if output.maps is not None:
            held_out.add_attention(tally, batch, output.maps)
        held_out.add_words(tally, batch, output.word_predicted)
    found = tally.figures()
    return {name: found[name] for name in LOOKS if name in found}


@torch.no_grad()
def first_map(model: nn.Module, whole: Whole) -> list[float]:
    """The attention map of the first held-out clip's answer, over its visual tokens in order."""
    model.eval()
    batch = rows(whole, torch.tensor([0]), None, model.device)
    return [round(value, 5) for value in model(**batch, gk_record="maps").maps[0, 0].tolist()]


def _read(
    model: nn.Module, whole: Whole, position: Tensor | None, tally: Tally, **options: Any
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """(batch, output) of all drawings in turn, whose rows the tally is told."""
    model.eval()
    for index in torch.arange(len(whole["input_ids"])).split(_BATCH):
        batch = rows(whole, index, position)
        tally.begin(index.tolist(), ())
        yield batch, model(**batch, **options)
