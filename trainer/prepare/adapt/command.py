"""`python -m trainer prepare adapt`: public data sets as they lie on disk to canonical samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.prepare.arguments import add_choice, add_common, add_places

HELP = "public data sets, in the formats their users have on disk, to samples"
DATA_SETS = {
    "chartqa": "ChartQA: the original folder, or a Hugging Face data set",
    "cord": "CORD: the original folder, or a Hugging Face data set",
    "docvqa": "DocVQA: the original JSON, or a Hugging Face data set",
    "flickr30k": "Flickr30k Entities: the folder of Annotations and Sentences",
    "funsd": "FUNSD: the folder of training_data and testing_data",
    "infographicvqa": "InfographicVQA: the original JSON, or a Hugging Face data set",
    "pixmo_points": "PixMo-Points: the Hugging Face data set and a folder of its images by SHA-256",
    "refcoco": "RefCOCO, RefCOCO+, RefCOCOg: refs(...).p and instances.json, or Hugging Face",
    "screenspot": "ScreenSpot, OS-Atlas, SeeClick, ShowUI: JSON lists, or a Hugging Face data set",
    "sroie": "SROIE: the folder of img, box and key",
    "squad": "SQuAD 1 and 2, text only: the original JSON, or a Hugging Face data set",
    "visual_genome": "Visual Genome: region_descriptions.json or objects.json",
    "xfund": "XFUND: its JSON files, one a language and split",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prepare adapt`."""
    listed = "; ".join(f"{name}: {text.partition(': ')[2]}" for name, text in DATA_SETS.items())
    parser.add_argument("dataset", choices=tuple(DATA_SETS), metavar="DATASET", help=listed)
    parser.add_argument("data", type=Path, help="the file or folder that holds the annotations")
    parser.add_argument("--split", help="of a data set that has several, such as train")
    add_places(parser, question=None, answer=None, own="; default: the data set's own")
    parser.add_argument(
        "--ocr", type=Path, help="docvqa, infographicvqa: folder of the OCR files, for words"
    )
    parser.add_argument(
        "--unanswerable",
        metavar="TEXT",
        help="squad: the answer to questions without one; default: skip them",
    )
    add_choice(parser, "--points-in", ("percent", "pixel"), "pixmo_points: unit of the points")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Converts, writes, and prints the counts."""
    from trainer.prepare.adapt.common import Options
    from trainer.prepare.adapt.work import Adapt
    from trainer.prepare.placing import TITLES
    from trainer.prepare.running import run_work, show_counts

    work = Adapt(arguments.dataset, Options.of(arguments))
    source, root = work.inputs()
    out = run_work(arguments, source, work.rooted(root), root=root)
    words = {"words": "words", "words_outside": "words of the OCR outside their image, left out"}
    show_counts(out.counts, TITLES | words)
    return 0
