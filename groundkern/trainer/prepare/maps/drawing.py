"""Drawn tasks as inputs of the pipeline: an input is a task and a number, made in the workers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.maps.tasks import CLIPS, TASKS, stored, stream
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.sources import Item, Source, values


@dataclass(frozen=True)
class Draw:
    """Draws the input `(task, number)`."""

    seed: int
    split: str
    settings: dict
    own: dict[str, dict[str, int]]
    grid: Grid | None
    folder: str

    def __call__(self, item: Item) -> Made:
        task, number = item.value
        options = {**self.settings, **self.own[task]}
        drawings = stream(task, count=1, start=number, seed=self.seed, split=self.split, **options)
        drawing, sample = next(drawings)
        named, files = stored(drawing, f"{self.folder}/{task}-{number:07d}")
        counts = {"regions": len(sample["regions"])}
        if self.grid is not None:
            counts.update(self.grid.counts(sample, drawing.size))
        return Made([sample | named], files, counts)


def prepared(arguments: argparse.Namespace, grid: Grid | None) -> tuple[Source, Draw]:
    """The inputs and the work of `prepare maps --task`.

    Raises:
        ConfigError: an unknown task, split, difficulty, size or setting.
    """
    if arguments.count < 1:
        raise ConfigError(f"maps: `--count`: expected a positive number, got {arguments.count}")
    own = _own_settings(arguments.task, arguments.set)
    for name in CLIPS.keys() & own if grid is not None else ():
        raise ConfigError(f"maps: `--grid`: expected tasks that draw images, got {name}")
    settings = {"size": arguments.size, "difficulty": arguments.difficulty}
    work = Draw(
        arguments.seed,
        arguments.split or "train",
        settings,
        own,
        grid,
        f"{arguments.output.stem}_images",
    )
    inputs = [(task, 0) for task in arguments.task]
    try:
        for i, first in enumerate(inputs):  # refuses what cannot be drawn before it draws anything
            work(Item(i, first[0], first))
    except ValueError as error:
        raise ConfigError(f"maps: {error}") from None

    def read() -> Iterator[tuple[str, tuple[str, int]]]:
        for number in range(arguments.count):
            for task in arguments.task:
                yield f"{task} {number}", (task, number)

    return values(read, total=arguments.count * len(arguments.task), identity={"drawn": 1}), work


def _own_settings(names: list[str], words: list[str]) -> dict[str, dict[str, int]]:
    """The `--set` options of each task; one that no task has is an error."""
    tasks = TASKS | CLIPS
    for name in names:
        if name not in tasks:
            known = ", ".join(tasks)
            raise ConfigError(f"maps: `--task`: expected some of {known}, got {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError("maps: `--task`: expected each task once")
    own: dict[str, dict[str, int]] = {name: {} for name in names}
    for word in words:
        setting, _, text = word.partition("=")
        having = [name for name in names if setting in tasks[name].settings["easy"]]
        if not having or not text.isdecimal():
            known = sorted({s for name in names for s in tasks[name].settings["easy"]})
            wanted = f"NAME=NUMBER with a name of {', '.join(known)}"
            raise ConfigError(f"maps: `--set`: expected {wanted}, got {word!r}")
        for name in having:
            own[name][setting] = int(text)
    return own
