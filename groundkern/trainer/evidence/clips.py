"""The picture of the studies on clips: the first held-out clip, and where trained models look."""

from __future__ import annotations

import io
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundkern.maps import patch_grid
from groundkern.trainer import durable
from groundkern.trainer.evidence.curves import Curves
from groundkern.trainer.evidence.plan import METHODS, Preset, Study
from groundkern.trainer.evidence.tables import CLIP
from groundkern.trainer.pictures import heated
from groundkern.trainer.prepare.maps.tasks import CLIPS, stream

_SHOWN = ("plain", "klal", "klal_elsewhere")
_PIXELS = 168  # of a frame's side in the picture
_SEED = 0  # whose maps are shown


def draw_clips(output: Path, preset: Preset, curves: dict[str, Curves]) -> None:
    """Write `evidence_clip.png`, unless no study on clips has a map yet: its frames from left to
    right, below them each method's map, the place and the second that are asked for framed.

    Args:
        output: of the study.
        preset: which studies.
        curves: those that are done.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(study, _maps(curves.get(study.name, {}))) for study in preset.studies]
    shown = [(study, maps) for study, maps in shown if study.drawings.task in CLIPS and maps]
    if not shown:
        return
    across = max(study.drawings.arguments()["seconds"] for study, _ in shown)
    down = [1 + len(maps) for _, maps in shown]
    figure = Figure(figsize=(1.3 * across + 1.2, 1.4 * sum(down)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(shown), 1, height_ratios=down, squeeze=False)[:, 0]
    for part, (study, maps) in zip(parts, shown, strict=True):
        _sheet(part, study, maps)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90)
    durable.write_bytes(output / CLIP, picture.getvalue())


def _maps(curves: Curves) -> dict[str, list[float]]:
    """The map of each method that is shown and has one, of the first held-out clip."""
    found = {name: curves.get(name, {}).get(_SEED, {}).get("map") for name in _SHOWN}
    return {METHODS[name].title: values for name, values in found.items() if values}


def _sheet(part: Any, study: Study, maps: dict[str, list[float]]) -> None:
    drawings = study.drawings
    frames, record = next(stream(drawings.task, count=1, split="test", **drawings.arguments()))
    question, answer = (message["content"] for message in record["messages"])
    part.suptitle(f"{question[-1]['text']} {answer}", fontsize=9)
    (region,) = record["regions"]
    axes = part.subplots(1 + len(maps), len(frames), squeeze=False)
    large = [frame.resize((_PIXELS, _PIXELS), Image.NEAREST) for frame in frames]
    steps = np.reshape(list(maps.values()), (len(maps), len(frames), -1))
    side = isqrt(steps.shape[-1])  # visual tokens of a frame's side
    rects = patch_grid(side, side).tolist()
    rows = [large] + [
        [heated(frame, rects, heat, each.max()) for frame, heat in zip(large, each)]
        for each in steps
    ]
    x0, y0, x1, y1 = (value * _PIXELS / frames[0].width for value in region["box"])
    for axis, image in zip(axes.flat, chain.from_iterable(rows), strict=True):
        axis.imshow(image)
        axis.set_xticks([])
        axis.set_yticks([])
    for second, axis in enumerate(axes[0]):
        axis.set_title(f"second {second}", fontsize=8)
    for row, title in zip(axes, ["the clip", *maps], strict=True):
        row[0].set_ylabel(title.replace("`", "").replace(", ", ",\n"), fontsize=7)
        row[region["time"][0]].plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="black")
