"""What is compared with what: tasks with their drawings, methods with their settings, presets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TEACHERS = {"reader": "dv_sft", "pointer": "klal_phrase"}  # of a start, if not plain
LEVELS = (0.5, 0.9)  # answer accuracies whose steps are counted


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        objectives: their settings, as in the trainer's config.
        map_rows: of the collator.
        control: None, or what is made wrong on purpose (`drawings.CONTROLS`).
        of_regions: None, or what alone is told of a clip's regions (`drawings.PARTS`).
        heads: None, or which heads KLAL trains (`heads.HEADS`), by a plain run of the same seed.
        title: in tables.
    """

    title: str
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    map_rows: str = "predictor"
    control: str | None = None
    of_regions: str | None = None
    heads: str | None = None

    def settings(self) -> dict[str, Any]:
        """What a curve depends on, as JSON has it."""
        found = {name: value for name, value in asdict(self).items() if name != "title"}
        for name in ("of_regions", "heads"):  # which most methods have not
            if found[name] is None:  # and older curves did not know
                del found[name]
        return found

    def controls(self) -> dict[str, str]:
        """The built-in `control` of each of its objectives that has one."""
        found = {name: own.get("control") for name, own in self.objectives.items()}
        return {name: control for name, control in found.items() if control is not None}


_WORDS = {"dv_sft": {"weight": 0.5}}  # 0.002 is for a model that can already read
_MAPS: dict[str, dict] = {"klal": {}}
_SMAM = {"smam": {"alpha": 1.0, "gamma": 0.5}}  # an untrained model learns from the region first
_PHRASES = {"hist": {"maps": "attention"}}
METHODS = {
    "plain": Method("plain"),
    "klal_last": Method("KLAL, `last`", _MAPS, "last"),
    "klal": Method("KLAL, `predictor`", _MAPS),
    "klal_answer": Method("KLAL, `answer`", _MAPS, "answer"),
    "klal_phrase": Method("KLAL, `phrase_predictor`", _MAPS, "phrase_predictor"),
    "dv_sft": Method("DV-SFT", _WORDS),
    "klal_dv_sft": Method("KLAL, `predictor` + DV-SFT", _MAPS | _WORDS),
    "klal_last_dv_sft": Method("KLAL, `last` + DV-SFT", _MAPS | _WORDS, "last"),
    "smam": Method("SMAM", _SMAM),
    "klal_smam": Method("KLAL, `predictor` + SMAM", _MAPS | _SMAM),
    "smam_elsewhere": Method(
        "control: SMAM, another drawing's region", _SMAM, control="shuffled regions"
    ),
    "smam_dv_sft": Method("SMAM + DV-SFT", _SMAM | _WORDS),
    "hist": Method("HIST", _PHRASES),
    "klal_phrase_hist": Method(
        "KLAL, `phrase_predictor` + HIST", _MAPS | _PHRASES, "phrase_predictor"
    ),
    "klal_elsewhere": Method(
        "control: KLAL, another drawing's region", _MAPS, control="shuffled regions"
    ),
    "klal_uniform": Method("control: KLAL, uniform map", _MAPS, control="uniform map"),
    "klal_shuffled": Method(
        "control: KLAL, built-in `control: shuffled`", {"klal": {"control": "shuffled"}}
    ),
    "klal_ungated": Method("KLAL, half of the regions wrong", _MAPS, control="half wrong"),
    "klal_gated": Method(
        "KLAL, half of the regions wrong and gated", _MAPS, control="half wrong, gated"
    ),
    "klal_heads": Method("KLAL, 4 best heads of a plain run", _MAPS, heads="best"),
    "klal_other_heads": Method("KLAL, 4 of the other heads", _MAPS, heads="others"),
    "klal_space": Method("KLAL, where but not when", _MAPS, of_regions="space"),
    "klal_time": Method("KLAL, when but not where", _MAPS, of_regions="time"),
    "klal_phrase_elsewhere": Method(
        "control: KLAL, `phrase_predictor`, another drawing's region",
        _MAPS,
        "phrase_predictor",
        "shuffled regions",
    ),
    "klal_elsewhere_dv_sft": Method(
        "control: KLAL, another drawing's region + DV-SFT",
        _MAPS | _WORDS,
        control="shuffled regions",
    ),
    "dv_sft_elsewhere": Method(
        "control: DV-SFT, another drawing's words", _WORDS, control="shuffled words"
    ),
}


@dataclass(frozen=True)
class Drawings:
    """Drawings of a task: its name, pixels of a side, difficulty and own settings."""

    task: str
    size: int = 70
    difficulty: str = "easy"
    own: tuple[tuple[str, int], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `groundkern.trainer.prepare.maps.tasks.stream`."""
        return {"size": self.size, "difficulty": self.difficulty, **dict(self.own)}

    def details(self) -> str:
        """Difficulty and own settings, for people."""
        return ", ".join((self.difficulty, *(f"{name} {value}" for name, value in self.own)))

    def settings(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"task": self.task, **self.arguments()}


@dataclass(frozen=True)
class Study:
    """One task: how it is drawn and trained, and the methods that are compared on it.

    Args:
        name: of its folder and table.
        drawings: what is drawn.
        methods: names of METHODS, in the order in which they are run; "plain" is one of them.
        samples, held_out: drawings to train on and to hold out.
        steps, batch_size, learning_rate: of every run; the rate is constant after `warmup` steps.
        every: steps between two points of a curve.
        model: one of `models.SIZES`.
        start: train from "scratch"; from a "plain" run of the same task that was stopped when its
            held-out accuracy was first at least `start_at`; from the decoder of such a run on the
            drawings as "text", with the part that sees at random; or from a "reader" (a DV-SFT run)
            or a "pointer" (a KLAL run) on the drawings `first`, stopped likewise.
        first: what a reader or pointer has learnt; None for other starts.
        seeds: runs of each method; None: as many as the preset has.
    """

    name: str
    drawings: Drawings
    methods: tuple[str, ...]
    samples: int = 8000
    held_out: int = 256
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 20
    every: int = 50
    model: str = "1m"
    start: str = "scratch"
    start_at: float = 0.5
    first: Drawings | None = None
    seeds: int | None = None

    def settings(self, method: str, seed: int) -> dict[str, Any]:
        """Everything that a curve depends on but the number of its steps, as JSON has it."""
        others = ("methods", "steps", "drawings", "first", "seeds")
        own = {k: v for k, v in asdict(self).items() if k not in others}
        own |= {"first": self.first.settings()} if self.first else {}
        chosen = METHODS[method].settings()
        return {**own, "drawings": self.drawings.settings(), "method": chosen, "seed": seed}

    def folder(self, output: Path) -> Path:
        """Where its drawings are."""
        own = self.drawings
        settings = (own.difficulty, own.size, *(value for _, value in sorted(own.own)))
        return output / "data" / "-".join(map(str, (own.task, *settings, self.samples)))

    def described(self) -> str:
        """One sentence for people."""
        own = self.drawings
        details, first = own.details(), ""
        if self.first:
            first = f"{self.first.task} ({self.first.details()})"
        reached = f"until {self.start_at:.2f} of answers are right"
        start = {
            "scratch": "weights at random",
            "plain": f"plain training of the task {reached}",
            "reader": f"DV-SFT on {first} {reached}",
            "pointer": f"KLAL on {first} {reached}",
            "text": f"a decoder trained on the pages as text {reached}; vision at random",
        }[self.start]
        return (
            f"{own.task}, drawings of {own.size} px ({details}): "
            f"{self.samples:,} to train on, {self.held_out} held out; {self.steps:,} steps of "
            f"{self.batch_size}, AdamW {self.learning_rate:g}; model {self.model}, "
            f"starting from {start}."
        )


@dataclass(frozen=True)
class Preset:
    """What one command runs: studies, and how many seeds of each method.

    Args:
        name: of the preset.
        studies: in the order of their tables.
        seeds: runs of each method, where a study has no number of its own.
        of: the preset that it is a part of, whose tables and page its curves are for; None: its
            own.
    """

    name: str
    studies: tuple[Study, ...]
    seeds: int = 5
    of: str | None = None

    def seeds_of(self, study: Study) -> int:
        """How many seeds of each method a study has."""
        return study.seeds or self.seeds

    def runs(self) -> Iterator[tuple[Study, str, int]]:
        """(study, method, seed) in the order of value.

        First every study's plain runs beside its first method, then its other methods.
        """
        longest = max(len(study.methods) for study in self.studies)
        for number in range(1, longest):
            for study in self.studies:
                methods = study.methods[number : number + 1]
                if number == 1:
                    methods = study.methods[:2]
                for seed in range(self.seeds_of(study)):
                    yield from ((study, method, seed) for method in methods)
