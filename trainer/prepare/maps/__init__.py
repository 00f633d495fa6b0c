"""`python -m trainer prepare maps`: samples with target maps (KLAL), drawn or from annotations."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "samples whose answers have a place: boxes, points, lines of annotations, or drawn tasks"
TITLES = {
    "regions": "regions",
    "boxes_cut": "boxes that stuck out of their image a little, cut at its edge",
    "maps": "target maps",
    "maps_empty": "target maps on no token of the grid: no attention loss there",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from trainer.prepare.command import add_common

    parser.add_argument(
        "data", type=Path, nargs="?", help="annotations; without them, --task draws samples"
    )
    parser.add_argument(
        "--format",
        choices=("coco", "labelme", "yolo", "lines"),
        default="lines",
        help="of the annotations (docs/prepare-maps.md)",
    )
    parser.add_argument(
        "--images", type=Path, help="folder the annotations' images are in; default: the data's"
    )
    parser.add_argument("--question", default="Where is the {label}?", help="asked of annotations")
    parser.add_argument(
        "--answer",
        default="{label}",
        help="to it; what its first {...} stands for is tied to the place",
    )
    add_overhang(parser)
    parser.add_argument(
        "--task",
        nargs="+",
        help="line_intersection, line_tracing, grid_patch, word_page; --count of each",
    )
    parser.add_argument("--count", type=int, default=1000, help="drawings of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings")
    parser.add_argument(
        "--split", default="train", help="train, val or test: no drawing is in two of them"
    )
    parser.add_argument("--size", type=int, default=448, help="pixels of a drawing's side")
    parser.add_argument("--level", default="medium", help="easy, medium or hard")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="a task's own settings over the level's, such as lines=5",
    )
    parser.add_argument(
        "--grid", help="HEIGHTxWIDTH in visual tokens: say what the target maps are on it"
    )
    parser.add_argument(
        "--map-kind",
        choices=("neighbours", "uniform", "overlap", "gaussian"),
        default="neighbours",
        help="of the maps that --grid and --preview show",
    )
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="draw N of the maps, needs --grid"
    )
    add_common(parser)


def add_overhang(parser: argparse.ArgumentParser) -> None:
    """Adds `--overhang`."""
    parser.add_argument(
        "--overhang",
        type=float,
        default=0.01,
        help="share of an image's side by which a box may stick out, to be cut at its edge",
    )


def run(arguments: argparse.Namespace) -> int:
    from trainer.config import ConfigError
    from trainer.prepare.command import run_work, show_counts
    from trainer.prepare.maps import annotated, drawing
    from trainer.prepare.maps.grid import Grid, preview, show_maps

    if (arguments.data is None) == (arguments.task is None):
        got = "neither" if arguments.data is None else "both"
        raise ConfigError(f"maps: expected annotations or --task, got {got}")
    grid = Grid.of(arguments.grid, arguments.map_kind)
    if arguments.preview and grid is None:
        raise ConfigError("maps: --preview needs --grid")
    root = None
    if arguments.data is None:
        source, work = drawing.prepared(arguments, grid)
    else:
        source, work, root = annotated.prepared(arguments, grid)
    out = run_work(arguments, source, work, root=root, unit="image")
    show_counts(out.counts, TITLES)
    if grid is not None:
        show_maps(out.counts)
    if arguments.preview:
        print(preview(out.path, root or out.path.parent, grid, count=arguments.preview))
    return 0
