"""The page of a ranking: every head as a cell of layers x heads, and where the best one looks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from groundkern.trainer import durable
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.evaluation.grounding import Grounding
from groundkern.trainer.evaluation.report import number
from groundkern.trainer.heads.measuring import only_maps
from groundkern.trainer.heads.ranking import Ranking
from groundkern.trainer.heatmaps import heat_maps
from groundkern.trainer.pictures import close_up, colour_scale, full_scale, heat_picture
from groundkern.trainer.templating import environment

TITLES = {
    "share": "attention on the target, of that on its image",
    "hits": "how often the highest token is on the target",
    "mass": "attention on the image, of that on everything before",
    "entropy": "how often its map is among the least scattered",
}
_COLOURS = colour_scale(64)


class Cell(NamedTuple):
    """A head of the picture: its place, colour, title, and whether it was chosen."""

    x: int
    y: int
    colour: str
    title: str
    chosen: bool


class Chart(NamedTuple):
    """A figure of all heads, a row for each layer."""

    title: str
    top: str
    layers: tuple[int, ...]
    heads: int
    cells: list[Cell]


def write_page(
    path: Path,
    arguments: Namespace,
    ranking: Ranking,
    told: list[str],
    grounding: Grounding,
    dataset: JsonLinesDataset,
    indices: list[int],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        arguments: of the command.
        ranking: of its heads.
        told: the sentences on the terminal.
        grounding: of the model.
        dataset: the samples.
        indices: those that were measured.

    Raises:
        StorageError: the disk refuses.
    """
    names = [arguments.score, *(n for n in ranking.figures if n != arguments.score)]
    page = (
        environment()
        .get_template("heads.html")
        .render(
            model=arguments.model,
            data=arguments.data,
            told=told[: len(told) - len(ranking.chosen)],
            best=[
                (layer, head, number(found.value), number(found.low), number(found.high))
                for (layer, head), found in zip(ranking.chosen, ranking.intervals, strict=True)
            ],
            charts=[_chart(name, ranking.figures[name], ranking) for name in names],
            scale=_COLOURS[:: len(_COLOURS) // 8],
            pictures=_pictures(arguments.pictures, ranking, grounding, dataset, indices),
        )
    )
    durable.write_text(path, page)


def _chart(name: str, values: NDArray, ranking: Ranking) -> Chart:
    top = max(float(values.max()), 1e-12)
    chosen, cells = set(ranking.chosen), []
    for y, layer in enumerate(ranking.layers):
        for x, value in enumerate(values[y]):
            colour = _COLOURS[round(float(value) / top * (len(_COLOURS) - 1))]
            title = f"layer {layer}, head {x}: {value:.3f}"
            cells.append(Cell(x, y, colour, title, (layer, x) in chosen))
    return Chart(TITLES[name], f"{top:.3f}", ranking.layers, values.shape[1], cells)


def _pictures(
    most: int,
    ranking: Ranking,
    grounding: Grounding,
    dataset: JsonLinesDataset,
    indices: list[int],
) -> list[dict[str, Any]]:
    """The best head's map on the first samples, beside the mean of the chosen ones."""
    places = [(ranking.layers.index(layer), head) for layer, head in ranking.chosen]
    shown: list[dict[str, Any]] = []
    for index in indices:
        if len(shown) == most:
            break
        try:
            both = [
                heat_maps(
                    grounding.model,
                    grounding.collator,
                    {"": [index]},
                    dataset,
                    limit=1,
                    look=_Look(heads),
                )
                for heads in (places[:1], places)
            ]
        except (SampleError, ValueError):  # was told when it was measured
            continue
        if not both[0]:
            continue
        (best,), (chosen,) = both
        pictures = []
        for entry, title in ((best, "the best head"), (chosen, "the chosen heads, their mean")):
            values = entry["attention"]
            top = full_scale([values])
            pictures.append((heat_picture(entry, values, top), f"{title}, 0 to {top:.2g}"))
            if close := close_up(entry, values, top):
                pictures.append((close, f"{title}, around the region"))
        shown.append({**best, "pictures": pictures})
    return shown


class _Look:
    """Reads the mean map of some heads, as `groundkern.trainer.metrics.held_out.read` reads that of
    all.

    Args:
        heads: (number among the measured layers, head) of each.
    """

    def __init__(self, heads: list[tuple[int, int]]) -> None:
        self.heads = heads

    @torch.no_grad()
    def __call__(
        self, model: torch.nn.Module, batch: dict, *, autocast: torch.dtype | None, aligned: bool
    ) -> tuple[Any, Tensor, None]:
        """(output, maps [B, Rm, C], None)."""
        output = model(**only_maps(batch), gk_record="heads")
        maps = torch.stack([output.head_maps[:, :, at, head] for at, head in self.heads]).mean(0)
        return output, maps, None
