"""Arguments that several prepare commands have, each declared once, and what of them decides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundkern.trainer.prepare.shards import add_shards

ENGINES = ("auto", "rapid", "tesseract", "paddle")

# Arguments that decide how, not what: a rerun may change them.
FREE_TO_CHANGE = (
    "command",
    "prepare_command",
    "run",
    "output",
    "workers",
    "on_bad_sample",
    "overwrite",
    "shard",
    "gather",
)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds `--output`, `--workers`, `--on-bad-sample`, `--overwrite`, `--shard` and `--gather`."""
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file to make")
    parser.add_argument("--workers", type=positive(int), default=_cores(), help="processes")
    add_choice(parser, "--on-bad-sample", ("skip", "stop"), "reject it and go on, or stop")
    parser.add_argument("--overwrite", action="store_true", help="start again, whatever is there")
    add_shards(parser)


def add_samples(parser: argparse.ArgumentParser, what: str = "samples (JSON lines)") -> None:
    """Adds `input` and `--root`."""
    parser.add_argument("input", type=Path, help=what)
    parser.add_argument(
        "--root", type=Path, help="folder image paths start from (default: its own)"
    )


def add_reading(
    parser: argparse.ArgumentParser,
    title: str,
    *,
    min_confidence: float,
) -> Any:
    """Adds a group with how OCR reads an image; returns the group."""
    ocr = parser.add_argument_group(title)
    add_choice(ocr, "--engine", ENGINES, "OCR; auto: RapidOCR where installed, else tesseract")
    ocr.add_argument("--language", help="as the engine names it (default: English)")
    ocr.add_argument(
        "--page-mode",
        type=int,
        help="tesseract: 3 whole pages, 11 scattered words (default: what reads more)",
    )
    ocr.add_argument(
        "--scale",
        type=positive(float),
        help="enlarge images before reading (default: as the engine reads best)",
    )
    ocr.add_argument(
        "--min-confidence", type=float, default=min_confidence, help="drop words read below it"
    )
    ocr.add_argument(
        "--no-rotation",
        dest="rotation",
        action="store_false",
        help="take every page as upright",
    )
    return ocr


def add_pages(parser: argparse.ArgumentParser) -> None:
    """Adds `--dpi` and `--pages`, of documents."""
    group = parser.add_argument_group("pages of PDF and TIFF files")
    group.add_argument(
        "--dpi", type=positive(float), default=150.0, help="dots per inch of a rendered PDF page"
    )
    group.add_argument("--pages", help="which of each document, such as 1-3,7 (default: all)")


def add_places(
    parser: argparse.ArgumentParser, *, question: str | None, answer: str | None, own: str
) -> None:
    """Adds `--images`, `--question`, `--answer`, `--overhang`, `--box-style` and `--model` of
    samples made of annotations.

    Args:
        parser: gets them.
        question, answer: the defaults; None leaves them to the data set.
        own: what the defaults are, if the formatter does not show them.
    """
    parser.add_argument("--images", type=Path, help="folder the images are in; default: the data's")
    parser.add_argument("--question", default=question, help=f"asked about a place{own}")
    parser.add_argument(
        "--answer",
        default=answer,
        help=f"to it; what its first {{...}} stands for is tied to the place{own}",
    )
    parser.add_argument(
        "--overhang",
        type=float,
        default=0.01,
        help="share of an image's side by which a box may stick out, to be cut at its edge",
    )
    add_style(parser, default="per_mille", text="{box} and {point} are written")


def add_style(parser: Any, *, default: str, text: str) -> None:
    """Adds `--box-style` and `--model`, whose family says what "auto" is.

    Args:
        parser: gets them.
        default: what the style is if none is named, in words.
        text: what is written in it.
    """
    parser.add_argument(
        "--box-style",
        metavar="STYLE",
        help=f"how {text}: per_mille, qwen2.5, internvl, ... (docs/data/boxes.md), auto for that "
        f"--model; default: {default}",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the model that the samples are for, for styles and pixels of its processor",
    )


def add_choice(
    parser: Any, flag: str, choices: tuple[str, ...], text: str, *, default: str | None = None
) -> None:
    """Adds a flag with a few possible values, the first of them by default."""
    parser.add_argument(flag, choices=choices, default=default or choices[0], help=text)


def positive(kind: type) -> Callable[[str], Any]:
    """An argument type: an int or a float above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it for a text that is no number
    return convert


def named(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: getattr(arguments, name) for name in names}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the output, as plain values: the arguments but `FREE_TO_CHANGE`."""
    deciding = {k: v for k, v in vars(arguments).items() if k not in FREE_TO_CHANGE}
    plain = {k: _plain(v) for k, v in deciding.items()}
    return {"command": arguments.prepare_command, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
