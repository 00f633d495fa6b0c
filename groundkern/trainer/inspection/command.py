"""`groundkern inspect DATA`: samples as self-contained pages, as the model will see them.

With a model folder, the visual tokens, the labelled ones, the aligned text tokens and the counts
are those of `GroundingCollator`, that is of training. Without, the page shows the original images.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from groundkern.trainer.prepare.boxes import settings as boxes
from groundkern.trainer.video_options import add_videos, rules_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from groundkern.trainer.data.dataset import JsonLinesDataset
    from groundkern.trainer.inspection.pages import Pages
    from groundkern.trainer.inspection.showing import Show

HELP = "show samples with their regions, words and tokens in an HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("data", type=Path, help="JSON-lines file of samples")
    parser.add_argument(
        "--root", type=Path, help="folder image paths start from (default: its own)"
    )
    parser.add_argument(
        "--image-root", nargs="+", type=Path, default=[], metavar="DIR", help=boxes.IMAGE_ROOT
    )
    boxes.add_boxes(parser)
    boxes.add_coord(parser)
    add_videos(parser)
    parser.add_argument("--model", type=Path, help="model folder, whose processor's view is shown")
    parser.add_argument(
        "--control",
        choices=("shuffled", "random", "complement"),
        help="with --model: the wrong regions that a run with this `control` trains on",
    )
    parser.add_argument(
        "--control-seed", type=int, default=0, help="of the run: its training.seed (0)"
    )
    parser.add_argument("--output", type=Path, help="HTML file (default: DATA.inspect.html)")
    parser.add_argument("--samples", type=int, default=24, help="how many to show")
    parser.add_argument("--seed", type=int, help="show a random choice, not the first ones")
    which = parser.add_argument_group("which samples")
    which.add_argument("--task", nargs="+", help="only those of these tasks")
    which.add_argument("--where", nargs="+", help="only these lines, for example train.jsonl:17")
    which.add_argument("--warnings", action="store_true", help="only those with a warning")


def run(arguments: argparse.Namespace) -> int:
    """Checks every line, shows some, and says where the page is.

    Returns:
        The exit status: 1 if no sample of the file, or none of those shown, can be used.
    """
    from groundkern.trainer.bringing import bring
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.data.dataset import JsonLinesDataset
    from groundkern.trainer.inspection.labels import label_table
    from groundkern.trainer.inspection.pages import Pages
    from groundkern.trainer.inspection.showing import Show
    from groundkern.trainer.inspection.summary import oddities, summarise

    if not arguments.data.exists():
        raise ConfigError(f"{arguments.data}: expected a JSON-lines file, which is not there")
    if arguments.samples < 1:
        raise ConfigError(f"inspect: `--samples`: expected 1 or more, got {arguments.samples}")
    if arguments.control is not None and arguments.model is None:
        raise ConfigError("inspect: `--control`: expected a --model beside it, got none")
    output = arguments.output or arguments.data.with_suffix(".inspect.html")
    brought = bring(
        arguments.data,
        root=arguments.root,
        folder=output.with_suffix(""),
        image_roots=arguments.image_root,
        boxes=partial(boxes.BoxSettings.read_as, arguments.boxes, arguments.coord, arguments.model),
    )
    model = None
    if arguments.model is not None:
        from groundkern.trainer.inspection.seen import SeenByModel

        model = SeenByModel(arguments.model)
    dataset = JsonLinesDataset(
        brought.path, root=brought.root, lost=brought.lost, videos=rules_of(arguments)
    )
    indices = candidates(dataset, arguments)
    if model is not None and arguments.control is not None:
        model.make_wrong(arguments.control, dataset, arguments.control_seed)
    odd = oddities(dataset)
    with Pages(output) as pages:
        show = Show(dataset, odd, model, only_warned=arguments.warnings)
        drawn, failed, counts, labels = _fill(pages, show, indices, arguments.samples)
        table = None if model is None else label_table(counts, labels, model.text)
        values = {
            "name": arguments.data.name,
            "model": arguments.model.name if arguments.model is not None else None,
            "summary": summarise(dataset, odd),
            "bad": dataset.bad,
            "shown": drawn,
            "counts": {name: n for name, n in counts.items() if n},
            "labels": table,
        }
        paths = pages.write(values)
    print(
        f"{len(dataset):,} samples, {len(dataset.bad):,} bad; {drawn:,} shown: {output}"
        f"{f' and {len(paths) - 1:,} more pages' if len(paths) > 1 else ''} "
        f"(images from {dataset.root})"
    )
    for warning in table.warnings if table is not None else ():
        print(f"labels: {warning}")
    return _status(dataset, drawn, failed)


def candidates(dataset: JsonLinesDataset, arguments: argparse.Namespace) -> Sequence[int]:
    """The samples to choose from, by --task and --where, in the order in which they are shown.

    Raises:
        ConfigError: a task that no sample has, or a line that is not there.
        SampleError: a line that cannot be used.
    """
    indices: Sequence[int] = range(len(dataset))
    if arguments.where is not None:
        indices = sorted({_index_of(where, dataset) for where in arguments.where})
    if arguments.task is not None:
        from groundkern.trainer.config import ConfigError
        from groundkern.trainer.wording import short

        for task in arguments.task:
            if task not in (known := sorted(set(dataset.tasks))):
                raise ConfigError(
                    f"inspect: `--task`: expected one of {short(known)}, got {task!r}"
                )
        indices = [index for index in indices if dataset.tasks[index] in arguments.task]
    if arguments.seed is not None:
        chosen = len(indices) if arguments.warnings else min(arguments.samples, len(indices))
        indices = random.Random(arguments.seed).sample(indices, chosen)
        return indices if arguments.warnings else sorted(indices)
    return indices


def _index_of(where: str, dataset: JsonLinesDataset) -> int:
    """The sample that `train.jsonl:17` or `17` names."""
    from groundkern.trainer.config import ConfigError
    from groundkern.trainer.data.images import SampleError

    file, _, number = where.rpartition(":")
    if file not in ("", dataset.path.name, str(dataset.path)) or not number.isdecimal():
        wanted = f"lines as {dataset.path.name}:17"
        raise ConfigError(f"inspect: `--where`: expected {wanted}, got {where!r}")
    at = int(dataset.lines.searchsorted(int(number)))
    if at < len(dataset) and dataset.lines[at] == int(number):
        return at
    name = f"{dataset.path.name}:{number}"
    for bad in dataset.bad:
        if bad.where == name:
            raise SampleError(f"{name}: {bad.reason} (images from {dataset.root})")
    raise ConfigError(f"inspect: `--where`: expected a line with a sample, got {where!r}")


def _fill(
    pages: Pages, show: Show, indices: Sequence[int], count: int
) -> tuple[int, int, Counter, Counter]:
    """Adds samples to the pages: how many, how many of them failed, what their supervision and
    their labels are."""
    from groundkern.trainer.inspection.showing import shown
    from groundkern.trainer.progress import progress

    drawn, failed, counts, labels = 0, 0, Counter(), Counter()
    with progress("show", total=min(count, len(indices)), unit="sample") as bar:
        for piece in shown(show, indices, count):
            pages.add(piece)
            counts.update(piece.counts)
            labels.update(piece.labels)
            drawn, failed = drawn + 1, failed + piece.failed
            bar.update()
    return drawn, failed, counts, labels


def _status(dataset: JsonLinesDataset, drawn: int, failed: int) -> int:
    """1, with a sentence, if nothing of the file or of what is shown can be used."""
    if len(dataset) == 0:
        why = "expected samples, got an empty file"
        if dataset.bad:
            why = f"expected samples, got {len(dataset.bad):,} lines that cannot be used; the first"
            why += f": {dataset.bad[0].where}: {dataset.bad[0].reason}"
    elif failed and failed == drawn:
        why = f"expected samples that can be shown, got {failed:,} of {drawn:,} that cannot"
        why += "; the page says why"
    else:
        return 0
    print(f"error: {dataset.path}: {why} (images from {dataset.root})", file=sys.stderr)
    return 1
