"""`groundkern evaluate --model M --data D --output OUT`: the options and the run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from groundkern.trainer.prepare.boxes.settings import IMAGE_ROOT, add_boxes
from groundkern.trainer.video_options import add_videos

HELP = "let a model answer held-out samples, score the answers and compare them"
COORDS = ("pixel", "resized", "unit", "per_mille", "percent")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    add_subject(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for everything it makes")
    add("--compare", type=Path, help="output of another evaluation of the same samples")
    add("--metrics", nargs="+", metavar="NAME", help="of the answers (default: by task)")
    add("--samples", type=positive, help="of each task at most, the first ones (all)")
    add("--max-new-tokens", type=positive, default=128, help="of an answer at most (128)")
    add("--no-grounding", action="store_true", help="without the figures of where it looks")
    add("--gradcam", action="store_true", help="GradCAM too, which needs the memory of training")
    add("--failures", type=count, default=12, help="of each task in the report (12)")
    add(
        "--timeout",
        type=positive,
        default=7200,
        metavar="SECONDS",
        help="that a process waits for the others (7200)",
    )


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and samples, and how the model is run on them."""
    add = parser.add_argument
    add("--model", required=True, help="model folder, finished run, checkpoint or hub name")
    add("--adapter", help="folder of a PEFT adapter of that model")
    add("--data", type=Path, required=True, help="JSON-lines file of samples")
    add("--root", type=Path, help="folder image paths start from (default: that of --data)")
    add("--image-root", nargs="+", type=Path, default=[], metavar="DIR", help=IMAGE_ROOT)
    add("--coord", choices=COORDS, help="of boxes in answers that do not say (as in the golds)")
    add_boxes(parser)
    add_videos(parser)
    add("--batch-size", type=positive, default=8, help="samples in a forward pass (8)")
    add("--dtype", choices=DTYPES, help="of the weights (bfloat16; on a CPU float32)")
    add("--device", help="for example cuda:1 (default: an accelerator if there is one, else cpu)")
    add("--attn-implementation", default="sdpa", help="as in transformers (sdpa)")
    add(
        "--allowed-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="special tokens that messages may hold, such as <|box_start|>",
    )
    add("--on-bad-sample", choices=("skip", "stop"), default="skip", help="or end at the first")


def run(arguments: argparse.Namespace) -> None:
    """Answers what is not answered yet, scores, compares, and says where the report is."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from groundkern.trainer.evaluation.running import evaluate

    report = evaluate(arguments)
    if report is not None:
        print(f"Report: {report}")


def positive(text: str) -> int:
    """A whole number of 1 or more, of a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def count(text: str) -> int:
    """A whole number of 0 or more, of a command line."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value
