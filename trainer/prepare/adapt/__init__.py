"""`python -m trainer prepare adapt`: public data sets as they lie on disk to canonical samples."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "public data sets, in the formats their users have on disk, to samples"
DATA_SETS = {
    "chartqa": "ChartQA: the original folder, or a Hugging Face data set",
    "docvqa": "DocVQA: the original JSON, or a Hugging Face data set",
    "flickr30k": "Flickr30k Entities: the folder of Annotations and Sentences",
    "infographicvqa": "InfographicVQA: the original JSON, or a Hugging Face data set",
    "pixmo_points": "PixMo-Points: the Hugging Face data set and a folder of its images by SHA-256",
    "refcoco": "RefCOCO, RefCOCO+, RefCOCOg: refs(...).p and instances.json, or Hugging Face",
    "squad": "SQuAD 1 and 2, text only: the original JSON, or a Hugging Face data set",
    "visual_genome": "Visual Genome: region_descriptions.json",
}
TITLES = {
    "regions": "regions",
    "words": "words",
    "boxes_cut": "boxes or points that stuck out of their image a little, moved to its edge",
    "words_outside": "words of the OCR outside their image, left out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from trainer.prepare.command import add_common
    from trainer.prepare.maps import add_overhang

    listed = "; ".join(f"{name}: {text.partition(': ')[2]}" for name, text in DATA_SETS.items())
    parser.add_argument("dataset", choices=tuple(DATA_SETS), metavar="DATASET", help=listed)
    parser.add_argument("data", type=Path, help="the file or folder that holds the annotations")
    parser.add_argument("--images", type=Path, help="folder the images are in; default: the data's")
    parser.add_argument("--split", help="of a data set that has several, such as train")
    parser.add_argument(
        "--question", help="asked where the data set has none; default: the data set's own"
    )
    parser.add_argument(
        "--answer",
        help="to it; what its first {...} stands for is tied to the place; default: the data "
        "set's own",
    )
    parser.add_argument(
        "--ocr", type=Path, help="docvqa, infographicvqa: folder of the OCR files, for words"
    )
    parser.add_argument(
        "--unanswerable",
        metavar="TEXT",
        help="squad: the answer where there is none; default: skip",
    )
    parser.add_argument(
        "--points-in",
        choices=("percent", "pixel"),
        default="percent",
        help="pixmo_points: unit of the points",
    )
    add_overhang(parser)
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    from trainer.prepare.adapt.common import Adapt, Options
    from trainer.prepare.command import run_work, show_counts

    work = Adapt(arguments.dataset, Options.of(arguments))
    source, root = work.inputs()
    out = run_work(arguments, source, work.rooted(root), root=root)
    show_counts(out.counts, TITLES)
    return 0
