"""`groundkern prepare maps`: samples with target maps (KLAL), drawn or from annotations."""

from __future__ import annotations

import argparse
from pathlib import Path

from groundkern.trainer.prepare.arguments import add_choice, add_common, add_places

HELP = "samples whose answers have a place: boxes, points, lines of annotations, or drawn tasks"
TITLES = {
    "maps": "target maps",
    "maps_empty": "target maps on no token of the grid: no attention loss there",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare maps`."""
    parser.add_argument(
        "data", type=Path, nargs="?", help="annotations; without them, --task draws samples"
    )
    add_choice(
        parser,
        "--format",
        ("coco", "voc", "labelme", "labelstudio", "cvat", "yolo", "lines"),
        "of the annotations (docs/data/prepare-maps.md)",
        default="lines",
    )
    add_choice(parser, "--prefer", ("box", "mask"), "coco, voc: the place of what has both")
    parser.add_argument("--names", type=Path, help="coco results: file of images and categories")
    add_places(parser, question="Where is the {label}?", answer="{label}", own="")
    parser.add_argument(
        "--task",
        nargs="+",
        help="line_intersection, line_tracing, grid_patch, word_page, asked_line, two_objects, "
        "pointing, bar_chart, coloured_bars; clips: moving_patch, appearing_patch; --count of each",
    )
    parser.add_argument("--count", type=int, default=1000, help="drawings of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings")
    parser.add_argument(
        "--split",
        help="drawings: train (default), val or test, no drawing is in two of them; voc: a list of "
        "ImageSets/Main; cvat: a subset; default: all",
    )
    parser.add_argument("--size", type=int, default=448, help="pixels of a drawing's side")
    parser.add_argument("--difficulty", default="medium", help="easy, medium or hard")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="a task's own settings over those of the difficulty, such as lines=5",
    )
    parser.add_argument(
        "--grid", help="HEIGHTxWIDTH in visual tokens: say what the target maps are on it"
    )
    add_choice(
        parser,
        "--map-kind",
        ("neighbours", "uniform", "overlap", "gaussian"),
        "of the maps that --grid and --preview show",
    )
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="draw N of the maps, needs --grid"
    )
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Makes the samples, and says or shows what their target maps are."""
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.prepare.maps import annotated, drawing
    from groundkern.trainer.prepare.maps.grid import Grid, preview, show_maps
    from groundkern.trainer.prepare.placing import TITLES as PLACED
    from groundkern.trainer.prepare.running import run_work, show_counts

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
    out = run_work(arguments, source, work, root=root, unit="record" if root else "image")
    show_counts(out.counts, PLACED | TITLES)
    if grid is not None:
        show_maps(out.counts)
    if arguments.preview:
        print(preview(out.path, root or out.path.parent, grid, count=arguments.preview))
    return 0
