"""Drawn tasks: KLAL's synthetic ones, DV-SFT's pages of words, HIST's two objects, bar charts.

A drawing is planned first and drawn afterwards. The plan holds everything that an answer or a
target depends on; its hash decides whether it belongs to the training, validation or test split,
so that no plan is ever in two of them, whatever the seeds. Targets are what was drawn: the same
numbers go to the pen and into the regions.

Source: KLAL, arXiv 2511.12738 (which leaves the details of the drawings open), and DV-SFT,
arXiv 2605.26656.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from groundkern.trainer.prepare.maps.drawn import charts, clips, grids, lines, objects, pages
from groundkern.trainer.prepare.maps.drawn.limits import limit

SPLITS = {"train": range(80), "val": range(80, 90), "test": range(90, 100)}  # percent of plans
DIFFICULTIES = ("easy", "medium", "hard")
SMALLEST, LARGEST = 64, 4096  # pixels of an image's side
_TRIES = 10_000  # plans drawn in search of one of a rare split
Drawn = Image.Image | tuple[Image.Image, ...]
"""An image, or the frames of a clip, one a second."""


@dataclass(frozen=True)
class Task:
    """A kind of drawing, called with a seed: `image, sample = TASKS["grid_patch"](7)`.

    Args:
        name: as in `TASKS`, and the `task` of its records.
        plan: a random generator, the image's side and the task's own settings to a plan, plain
            values of which everything that matters is drawn.
        draw: a plan and a random generator (for what does not matter, such as the colour of the
            paper) to the image, or the frames of a clip, and the record of
            docs/data/data-format.md, `images` and `videos` still empty.
        settings: the task's own settings at each difficulty.
        smallest: pixels of the image's side.
    """

    name: str
    plan: Callable[..., dict]
    draw: Callable[[dict, random.Random], tuple[Drawn, dict]]
    settings: dict[str, dict[str, int]]
    smallest: int = SMALLEST

    def __call__(
        self,
        seed: int | str,
        *,
        split: str = "train",
        size: int = 448,
        difficulty: str = "medium",
        **own: int,
    ) -> tuple[Drawn, dict]:
        """One drawing.

        Args:
            seed: the same seed and settings draw the same pixels and answer.
            split: "train", "val" or "test"; their plans are disjoint.
            size: pixels of the image's side (a grid or page may be smaller by what does not fill a
                cell).
            difficulty: "easy", "medium" or "hard", see `settings`.
            **own: the task's own settings, over those of the difficulty.

        Returns:
            An RGB image or a clip's frames, and the record: coordinates in pixel edges, `images`
            and `videos` empty.

        Raises:
            ValueError: an unknown split, difficulty or setting, or one that cannot be drawn.
        """
        one_of("split", split, SPLITS)
        one_of("difficulty", difficulty, DIFFICULTIES)
        for name in own:
            one_of("setting", name, self.settings["easy"])
        settings = {**self.settings[difficulty], **own}
        for name, value in {"size": size, **settings}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}`: expected a positive whole number, got {value!r}")
        limit("size", size, self.smallest, LARGEST)
        rng = random.Random(f"{self.name} {seed}")
        for _ in range(_TRIES):
            plan = self.plan(rng, size, **settings)
            if _bucket(plan) in SPLITS[split]:
                return self.draw(plan, rng)
        raise ValueError(f"`split`: expected {self.name} drawings for {split}, got none")


def stream(
    name: str, *, count: int, seed: int = 0, split: str = "train", start: int = 0, **settings
) -> Iterator[tuple[Drawn, dict]]:
    """`count` drawings of a task from number `start` on, each with its own seed."""
    known = TASKS | CLIPS
    one_of("task", name, known)
    for i in range(start, start + count):
        yield known[name](f"{seed} {split} {i}", split=split, **settings)


def stored(drawing: Drawn, name: str) -> tuple[dict, dict[str, Image.Image]]:
    """What a record calls a drawing, and the files that it then stands for.

    Args:
        drawing: an image, or the frames of a clip.
        name: of its file or folder, without an ending.

    Returns:
        The record's `images` or `videos`, and images by the names of their files.
    """
    if isinstance(drawing, Image.Image):
        return {"images": [f"{name}.png"]}, {f"{name}.png": drawing}
    files = {f"{name}/{second}.png": frame for second, frame in enumerate(drawing)}
    return {"videos": [{"path": name, "fps": 1}]}, files


def one_of(name: str, value: object, known: object) -> None:
    """Raise the `ValueError` that names what there is, unless `value` is among the `known`."""
    if value not in known:
        raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")


def _bucket(plan: dict) -> int:
    digest = hashlib.sha256(repr(sorted(plan.items())).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def _by_difficulty(settings: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, int]]:
    return {
        difficulty: {name: values[number] for name, values in settings.items()}
        for number, difficulty in enumerate(DIFFICULTIES)
    }


_ANY = (pages.ALL_WORDS,) * 3
_INTERSECTION = _by_difficulty({"segments": (2, 4, 6)})
_TRACING = _by_difficulty({"lines": (3, 4, 6), "steps": (2, 4, 8)})
_GRID = _by_difficulty({"side": (4, 8, 16)})
_PAGE = _by_difficulty({"cell": (56, 28, 20), "vocabulary": _ANY})
_OBJECTS = _by_difficulty({"objects": (3, 5, 8), "side": (2, 3, 4)})
_POINTING = _by_difficulty({"objects": (4, 8, 16), "side": (3, 5, 8), "asked": (2, 2, 2)})
_CHART = _by_difficulty(
    {"bars": (3, 5, 8), "asked": (1, 2, 3), "largest": (99, 99, 99), "names": _ANY}
)
_COLOURS = _by_difficulty({"bars": (3, 4, 6), "largest": (9, 99, 99)})
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("line_intersection", lines.plan_intersection, lines.draw_intersection, _INTERSECTION),
        Task("line_tracing", lines.plan_tracing, lines.draw_tracing, _TRACING),
        Task("grid_patch", grids.plan_grid, grids.draw_grid, _GRID),
        Task("word_page", pages.plan_page, pages.draw_page, _PAGE),
        Task("asked_line", pages.plan_page, pages.draw_asked, _PAGE),
        Task("two_objects", objects.plan_objects, objects.draw_objects, _OBJECTS),
        Task("pointing", objects.plan_pointing, objects.draw_pointing, _POINTING),
        Task("bar_chart", charts.plan_chart, charts.draw_chart, _CHART),
        Task("coloured_bars", charts.plan_colours, charts.draw_colours, _COLOURS),
    )
}
_CLIP = _by_difficulty({"side": (3, 4, 5), "seconds": (6, 8, 9), "others": (2, 2, 3)})
CLIPS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("moving_patch", clips.plan_moving, clips.draw_moving, _CLIP, 16),
        Task("appearing_patch", clips.plan_appearing, clips.draw_appearing, _CLIP, 16),
    )
}
