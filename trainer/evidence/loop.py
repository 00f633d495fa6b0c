"""One curve: held-out answers right after every so many steps; continued where it was stopped.

A loop of its own and not the Trainer's: batches are rows of one tensor and there is no logging of a
step. The order of drawings follows from the seed and the step alone and no module draws random
numbers, so weights, optimizer and points are all that a continued curve needs to have the same bits
as one that was never stopped.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundkern import metrics
from groundkern.hf import DvSft, Hist, Klal, Smam, attach, row_counts
from groundkern.maps import FIXED_POINT_ONE
from trainer import durable
from trainer.config import ConfigError
from trainer.evidence.drawings import Whole, rows
from trainer.evidence.plan import Method, Study

KINDS = {"smam": Smam, "dv_sft": DvSft, "klal": Klal, "hist": Hist}
SATURATED, PATIENCE = 0.99, 3  # a curve ends after so many points of at least so much
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
            where the trained model looks}.

        Raises:
            ConfigError: what is kept is of other settings.
        """
        study, model = self.study, self.model
        attach(model, **{k: KINDS[k](**v) for k, v in self.method.objectives.items()})
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
        return {"points": points, "seconds": round(spent, 1), "at_end": looks}

    def ended(self, points: list[dict]) -> bool:
        """Whether the last points are as good as a curve gets, or as a start should be."""
        last = [point["accuracy"] for point in points]
        if self.ends is not None:
            return last[-1] >= self.ends
        return len(last) >= PATIENCE and min(last[-PATIENCE:]) >= SATURATED

    def _sets(self) -> list[tuple[str, Whole]]:
        return [("train", self.train), ("test", self.test)]

    def _step(self, optimizer: torch.optim.Optimizer, step: int, position: Tensor) -> None:
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


def positions(model: nn.Module, whole: Whole) -> Tensor:
    """int64 [3, N, S]: rotary positions, which the model would find again in every step."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    found, _ = model.model.get_rope_index(**{name: whole[name] for name in names})
    return found


@torch.no_grad()
def answers(model: nn.Module, whole: Whole, position: Tensor) -> dict[str, float]:
    """The share of answers that greedy decoding gets right, and the loss of their tokens.

    An answer is right if each of its tokens, its end included, is the likeliest after those before
    it, so that greedy decoding writes exactly it.
    """
    model.eval()
    right, loss, tokens = 0, 0.0, 0
    for index in torch.arange(len(whole["input_ids"])).split(_BATCH):
        batch = rows(whole, index, position, model.device)
        output = model(**batch)
        there = batch["gk_text_position"] >= 0
        target = batch["labels"].gather(1, (batch["gk_text_position"].long() + 1).clamp_min(0))
        right += int(((output.text_predicted == target) | ~there).all(1).sum())
        loss -= float(output.text_log_prob[there].sum())
        tokens += int(there.sum())
    return {"accuracy": right / len(whole["input_ids"]), "loss": loss / tokens}


@torch.no_grad()
def where_it_looks(model: nn.Module, whole: Whole, position: Tensor) -> dict[str, float]:
    """Attention of the row that predicts the answer, and the visual labels, of held-out drawings.

    Returns:
        "attention_mass" and "attention_argmax" on the target, "word_accuracy": of those that the
        drawings have.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {}
    for index in torch.arange(len(whole["input_ids"])).split(_BATCH):
        batch = rows(whole, index, position, model.device)
        output = model(**batch, gk_record="maps")
        there = batch["gk_map_position"] >= 0
        target = batch["gk_map_target"][there] >= 0.999 * FIXED_POINT_ONE
        valid = (batch["gk_map_columns"] >= 0)[:, None].expand(-1, there.shape[1], -1)[there]
        if len(target):
            for name, measure in (
                ("attention_mass", metrics.mass_on_target),
                ("attention_argmax", metrics.argmax_in_target),
            ):
                found.setdefault(name, []).append(measure(output.maps[there], target, valid))
        labelled = batch["gk_word_position"] >= 0
        if labelled.any():
            same = output.word_predicted[labelled] == batch["gk_word_label"][labelled]
            found.setdefault("word_accuracy", []).append(same)
    means = {name: torch.cat(values).double().nanmean() for name, values in found.items()}
    return {name: float(value) for name, value in means.items()}
