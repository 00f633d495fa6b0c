"""From a study to its stored curves: drawings, starts and one curve of each method and seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from groundkern.hf import GroundingCollator
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.controls import regions_of
from groundkern.trainer.demo.generate import corpus
from groundkern.trainer.evidence import models
from groundkern.trainer.evidence.curves import path_of
from groundkern.trainer.evidence.drawings import (
    CONTROLS,
    MAP_LEVELS,
    Whole,
    as_text,
    collate,
    draw,
    kept,
    parsed,
    told,
)
from groundkern.trainer.evidence.heads import chosen_heads, shares
from groundkern.trainer.evidence.loop import Curve, positions
from groundkern.trainer.evidence.plan import METHODS, TEACHERS, Method, Study
from groundkern.trainer.run_folder import claimed

_TOKENIZED = 400  # drawings whose texts a task's tokenizer is trained on, after the demo's texts
_START_STEPS = 10_000  # at most, until a start is as good as it should be
_HELD_OUT_ROWS = "predictor"  # of every model's held-out attention, whatever it was trained on


@dataclass
class Desk:
    """One study's files and what they hold, each made once.

    Args:
        output: folder of the whole study.
        study: a row of the plan.
    """

    output: Path
    study: Study

    def __post_init__(self) -> None:
        self.folder = self.study.folder(self.output)
        self._processor: Any = None
        self._wholes: dict[tuple, Whole] = {}

    def path(self, method: str, seed: int) -> Path:
        """The file of a curve."""
        return path_of(self.output, self.study.name, method, seed)

    def finished(self, method: str, seed: int) -> bool:
        """Whether a curve is there, to as many steps or more.

        Raises:
            ConfigError: a curve of other settings in the way.
        """
        path = self.path(method, seed)
        if not path.exists():
            return False
        found = durable.read_json(path)
        if found["settings"] != self.study.settings(method, seed):
            raise ConfigError(f"{path} is of other settings; choose another --output")
        return found["steps"] >= self.study.steps

    def curve(self, method: str, seed: int) -> dict[str, Any]:
        """A curve, which is read if it is there to as many steps, and else made or continued.

        Raises:
            ConfigError: a curve of other settings in the way.
        """
        path, settings = self.path(method, seed), self.study.settings(method, seed)
        if self.finished(method, seed):
            return durable.read_json(path)
        trained = self._with_heads(METHODS[method], seed)
        model = self._model(seed)
        training = Curve(
            self.study, trained, seed, model, self.train(trained, seed), self.test(),
            path.with_suffix(".pt"), settings,
        )  # fmt: skip
        made = training.run(self.study.steps)
        result = {"settings": settings, "steps": self.study.steps, **made}
        durable.write_json(path, result)
        path.with_suffix(".pt").unlink(missing_ok=True)  # of a hundred curves they add up
        return result

    def train(self, method: Method, seed: int) -> Whole:
        """The training drawings as a method sees them."""
        options = {"part": method.of_regions, "controls": method.controls()}
        whole = self._whole("train", method.map_rows, **options)
        if method.control is None:
            return whole
        return CONTROLS[method.control](whole, seed)

    def test(self) -> Whole:
        """The held-out drawings, the same for every method."""
        return self._whole("test", _HELD_OUT_ROWS)

    def _whole(
        self,
        split: str,
        map_rows: str,
        *,
        text: bool = False,
        part: str | None = None,
        controls: dict[str, str] | None = None,
    ) -> Whole:
        named = [f"{name}-{control}" for name, control in (controls or {}).items()]
        key = (split, "text" if text else map_rows, *([part] if part else []), *named)
        if key not in self._wholes:
            path, collator = self.folder / f"{'-'.join(key)}.pt", self._collator(map_rows, controls)
            records = told(self._records(split), part)
            if text:
                records = [as_text(record) for record in records]
            with claimed(path, wait=True):
                self._wholes[key] = kept(path, lambda: collate(self.folder, records, collator))
        return self._wholes[key]

    def _records(self, split: str) -> list[dict]:
        count = self.study.samples if split == "train" else self.study.held_out
        with claimed(self.folder / f"{split}.jsonl", wait=True):
            return draw(self.folder, self.study.drawings, split, count)

    def _collator(self, map_rows: str, controls: dict[str, str] | None = None) -> GroundingCollator:
        config = models.build(self.processor(), self.study.model, seed=0).config
        options = {"map_levels": MAP_LEVELS, "map_rows": map_rows}
        if controls:
            records = enumerate(self._records("train"))
            samples = (parsed(self.folder, record, number) for number, record in records)
            options |= {
                "side_control": controls.get("smam"),
                "map_control": controls.get("klal"),
                "control_pool": [regions_of(sample) for sample in samples],
            }
        return GroundingCollator(self.processor(), config, **options)

    def _with_heads(self, method: Method, seed: int) -> Method:
        """The method with the heads that it trains, which a plain run of its seed says."""
        if method.heads is None:
            return method
        path = self.output / "heads" / self.study.name / f"{seed}.json"
        with claimed(path, wait=True):
            share = self._shares(path, seed)
        pairs = chosen_heads(share, method.heads, seed)
        own = {**method.objectives["klal"], "chosen_heads": pairs}
        return replace(method, objectives={**method.objectives, "klal": own})

    def _shares(self, path: Path, seed: int) -> list[list[float]]:
        """Where each head of a plain run looks, which is kept.

        Raises:
            ConfigError: what is kept is of other settings.
        """
        settings, method = self.study.settings("plain", seed), METHODS["plain"]
        settings["steps"] = self.study.steps
        if path.exists():
            found = durable.read_json(path)
            if found["settings"] != settings:
                raise ConfigError(f"{path} is of other settings; choose another --output")
            return found["shares"]
        model, train, state = self._model(seed), self.train(method, seed), path.with_suffix(".pt")
        Curve(self.study, method, seed, model, train, self.test(), state, settings).run(
            self.study.steps
        )
        share = shares(model, train, positions(model, train)).tolist()
        durable.write_json(path, {"settings": settings, "shares": share})
        state.unlink(missing_ok=True)
        return share

    def processor(self) -> Any:
        """With a tokenizer of the demo's texts and of the task's."""
        if self._processor is None:
            texts = [part for r in self._records("train")[:_TOKENIZED] for part in _texts(r)]
            self._processor = models.build_processor([*_demo_texts(), *texts])
        return self._processor

    def _model(self, seed: int) -> torch.nn.Module:
        model = models.build(self.processor(), self.study.model, seed=seed)
        if self.study.start != "scratch":
            path = self.output / "starts" / self.study.name / f"{seed}.json"
            with claimed(path, wait=True):
                start = self._start(path, seed)
            if self.study.start == "text":  # what sees stays as it is: at random
                start = {k: v for k, v in start.items() if not k.startswith("model.visual.")}
            model.load_state_dict(start, strict=self.study.start != "text")
        return model.to(_device())

    def _first(self) -> Desk:
        """The drawings that a reader has learnt to read, for this study's processor."""
        desk = Desk(self.output, replace(self.study, drawings=self.study.first, first=None))
        desk.folder, desk._processor = self.folder / "first", self.processor()
        return desk

    def _start(self, path: Path, seed: int) -> dict[str, torch.Tensor]:
        """The weights of an earlier run that was stopped on its way: see `Study.start`.

        Raises:
            ConfigError: it did not get there.
        """
        study, order = self.study, seed + 10_000  # no order of a run
        method = METHODS[TEACHERS.get(study.start, "plain")]
        state, settings = path.with_suffix(".pt"), study.settings("plain", seed)
        if path.exists():
            if durable.read_json(path)["settings"] != settings:
                raise ConfigError(f"{path} is of other settings; choose another --output")
        else:
            model = models.build(self.processor(), study.model, seed=seed).to(_device())
            desk, text = self._first() if study.first else self, study.start == "text"
            wholes = [desk._whole(split, method.map_rows, text=text) for split in ("train", "test")]
            curve = Curve(
                study, method, order, model, *wholes, state, settings, ends=study.start_at
            )
            made = curve.run(_START_STEPS)
            if not curve.ended(made["points"]):
                accuracy = made["points"][-1]["accuracy"]
                raise ConfigError(
                    f"{study.name}: expected {method.title} training to reach {study.start_at} "
                    f"within {_START_STEPS} steps, got {accuracy:.3f}"
                )
            durable.write_json(path, {"settings": settings, **made})
        return torch.load(state, weights_only=True, map_location="cpu")["model"]


def _device() -> torch.device:
    there = torch.accelerator.current_accelerator(check_available=True)
    return there or torch.device("cpu")


@cache
def _demo_texts() -> tuple[str, ...]:
    return tuple(corpus())


def _texts(record: dict) -> list[str]:
    question, answer = (message["content"] for message in record["messages"])
    return [question[-1]["text"], answer]
