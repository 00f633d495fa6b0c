"""`python -m trainer inspect DATA`: samples as one self-contained page, as the model will see them.

With a model folder, the visual tokens, the labelled ones, the aligned text tokens and the counts
are those of `GroundingCollator`, that is of training. Without, the page shows the original images.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.data.dataset import JsonLinesDataset
    from trainer.data.sample import Sample

HELP = "show samples with their regions, words and tokens in an HTML page"
WIDE = 0.5  # of an image: a region over more of it teaches little about where to look


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("data", type=Path, help="JSON-lines file of samples")
    parser.add_argument(
        "--root", type=Path, help="folder image paths start from (default: its own)"
    )
    parser.add_argument("--model", type=Path, help="model folder, whose processor's view is shown")
    parser.add_argument("--output", type=Path, help="HTML file (default: DATA.inspect.html)")
    parser.add_argument("--samples", type=int, default=24, help="how many to show")
    parser.add_argument("--seed", type=int, help="show a random choice, not the first ones")


def run(arguments: argparse.Namespace) -> int:
    """Checks every line, shows some, and says where the page is."""
    from trainer import durable
    from trainer.bringing import bring
    from trainer.config import ConfigError
    from trainer.data.dataset import JsonLinesDataset
    from trainer.inspection.cards import card
    from trainer.templating import environment

    if not arguments.data.exists():
        raise ConfigError(f"{arguments.data}: expected a JSON-lines file, which is not there")
    output = arguments.output or arguments.data.with_suffix(".inspect.html")
    brought = bring(arguments.data, root=arguments.root, folder=output.with_suffix(""))
    model = None
    if arguments.model is not None:
        from trainer.inspection.seen import SeenByModel

        model = SeenByModel(arguments.model)
    dataset = JsonLinesDataset(brought.path, root=brought.root, lost=brought.lost)
    summary = summarise(dataset)
    shown = range(min(arguments.samples, len(dataset)))
    if arguments.seed is not None:
        shown = sorted(random.Random(arguments.seed).sample(range(len(dataset)), len(shown)))
    cards = [card(dataset.sample(index), model) for index in shown]
    page = (
        environment()
        .get_template("inspect.html")
        .render(
            name=arguments.data.name,
            model=arguments.model.name if arguments.model is not None else None,
            summary=summary,
            bad=dataset.bad,
            cards=cards,
            counts={k: n for k, n in model.counts.items() if n} if model is not None else {},
        )
    )
    durable.write_text(output, page, errors="replace")
    print(f"{len(dataset):,} samples, {len(dataset.bad):,} bad; {len(cards):,} shown: {output}")
    return 0


@dataclass
class Summary:
    """Counts over the whole file, and sentences about what looks wrong."""

    counts: dict[str, int]
    tasks: dict[str, int]
    warnings: list[str]


def summarise(dataset: JsonLinesDataset) -> Summary:
    """One pass over all usable samples; pixels are not read."""
    from trainer.progress import progress

    counts: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    first: dict[str, str] = {}
    with progress("count", total=len(dataset), unit="sample") as bar:
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            counts["images"] += len(sample.images)
            counts["regions"] += len(sample.regions)
            counts["words"] += len(sample.words)
            counts["phrases"] += len(sample.phrases)
            for kind in ("regions", "words", "phrases"):
                counts[f"samples with {kind}"] += bool(getattr(sample, kind))
            for why in oddities(sample):
                odd[why] += 1
                first.setdefault(why, sample.where)
            bar.update()
    warnings = [f"{why}: {n:,} (first: {first[why]})" for why, n in odd.most_common()]
    if dataset.bad:
        warnings.insert(0, f"lines that cannot be used: {len(dataset.bad):,} (listed below)")
    tasks = dict(Counter(dataset.tasks).most_common())
    return Summary({"samples": len(dataset), **counts}, tasks, warnings)


def oddities(sample: Sample) -> list[str]:
    """What a sample may have but is rarely meant, each as "samples ..."."""
    from groundkern.hf.data.example import message_text

    found = []
    if not (sample.regions or sample.words or sample.phrases):
        found.append("samples without supervision")
    if sample.regions and not sample.images:
        found.append("samples with regions and no image")
    texts = [message_text(m) for m in sample.messages if m["role"] == "assistant"]
    if not all(text.strip() for text in texts):
        found.append("samples with an empty answer")
    boxes = [box for region in sample.regions for box in region.boxes]
    if any((x1 - x0) * (y1 - y0) > WIDE for x0, y0, x1, y1 in boxes):
        found.append("samples with a region box over more than half of its image")
    if len(set(sample.words)) < len(sample.words):
        found.append("samples with the same word in the same box twice")
    return found
