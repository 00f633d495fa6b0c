"""`groundkern prepare adapt`: public data sets as they lie on disk to canonical samples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groundkern.trainer.prepare.arguments import add_choice, add_common, add_places
from groundkern.trainer.prepare.boxes import settings as boxes

HELP = "public data sets, in the formats their users have on disk, to samples"
DATA_SETS = {
    "chat": "Chats: files of other fine-tuning programs (LLaVA, Qwen, OpenAI, LLaMA-Factory, TRL, "
    "ms-swift, ...), told by what is in them",
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
    parser.add_argument(
        "--image-root",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="chat: further folders that images may be in, for absolute paths",
    )
    parser.add_argument(
        "--take-chosen", action="store_true", help="chat: of preferences, the chosen answers"
    )
    boxes.add_arguments(parser.add_argument_group("chat: boxes in messages"))
    add_choice(parser, "--points-in", ("percent", "pixel"), "pixmo_points: unit of the points")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Converts, writes, and prints the counts."""
    from groundkern.trainer.prepare.adapt.common import Options
    from groundkern.trainer.prepare.adapt.work import Adapt
    from groundkern.trainer.prepare.placing import TITLES
    from groundkern.trainer.prepare.running import run_work, show_counts

    work = Adapt(arguments.dataset, Options.of(arguments))
    source, root = work.inputs()
    for sentence in work.rooted(root).warnings(source):
        print(f"warning: {sentence}", file=sys.stderr)
    out = run_work(arguments, source, work.rooted(root), root=root)
    words = {"words": "words", "words_outside": "words of the OCR outside their image, left out"}
    unread = {"fields_unread": "fields of messages that nothing here reads (names, times, ...)"}
    show_counts(out.counts, TITLES | boxes.TITLES | words | unread)
    return 0
