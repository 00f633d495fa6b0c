"""`python -m groundkern.trainer.demo DIR`: write the demo's data set and its small model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from groundkern.trainer.demo.make import SAMPLES, make_demo


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the demo under the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m groundkern.trainer.demo", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="gets the data and the model")
    parser.add_argument("--samples", type=_count, default=SAMPLES, help="training samples")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same files")
    options = parser.parse_args(arguments)
    try:
        make_demo(options.folder, samples=options.samples, seed=options.seed)
    except OSError as error:
        parser.error(f"{options.folder}: {error.strerror}")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
