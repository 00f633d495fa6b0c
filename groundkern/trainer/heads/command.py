"""`groundkern heads --model M --data D --output heads.json`: the options and the run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from groundkern.trainer.evaluation.command import add_subject, count, positive

HELP = "rank attention heads by how well they find the regions of labelled samples"
SCORES = ("share", "hits", "mass", "entropy")
ROWS = ("predictor", "last", "answer_predictor", "answer", "phrase_predictor", "phrase")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    add_subject(parser)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        help="JSON file of the chosen heads, for objectives.klal.chosen_heads; a page of the same "
        "name shows all of them (docs/running/heads.md)",
    )
    add("--top", type=positive, default=16, help="heads to choose (16)")
    add(
        "--score",
        choices=SCORES,
        default="share",
        help="share: attention on the target among that on its image; hits: how often the highest "
        "token is on the target; mass: attention on the image; entropy: without regard to the "
        "target, how often a head's map is among the least scattered (arXiv 2503.06287) (share)",
    )
    add("--samples", type=positive, default=256, help="with regions, drawn at random (256)")
    add("--seed", type=count, default=0, help="of that draw (0)")
    add(
        "--rows",
        choices=ROWS,
        default="predictor",
        help="rows whose maps count, as supervision.map_rows (predictor)",
    )
    add("--pictures", type=count, default=4, help="samples on the page with the best head's map")


def run(arguments: argparse.Namespace) -> None:
    """Measures, ranks, prints the best, and says where the file and the page are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from groundkern.trainer.heads.running import rank_heads

    page = rank_heads(arguments)
    print(f"Heads: {arguments.output}\nPage: {page}")
