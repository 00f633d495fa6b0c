"""`python -m benchmarks.families`: does groundkern work with each model type of transformers?

For every type of transformers' image-text-to-text models: attach, doctor, the geometry of its
images, the collator, and a step of every objective, on a tiny model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.families.examining import examined
from benchmarks.families.table import Row, counted, markdown, write_csv
from benchmarks.families.zoo import families
from groundkern.hf import Examination


def main(words: list[str] | None = None) -> int:
    """Prints a line for each type, and the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--csv", type=Path, help="file for every reason in full")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    arguments = parser.parse_args(words)
    zoo = families()
    known = list(dict.fromkeys([*sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES), *zoo]))
    for name in arguments.types:
        if name not in known:
            parser.error(f"types: expected model types of transformers or the zoo, got {name!r}")
    rows = []
    for name in arguments.types or known:
        rows.append(_row(name, zoo))
        print(" | ".join(rows[-1].cells()), flush=True)
    print(counted(rows))
    if arguments.csv is not None:
        write_csv(arguments.csv, rows)
    if arguments.markdown is not None:
        command = " ".join(["python -m benchmarks.families", *(words or sys.argv[1:])])
        arguments.markdown.write_text(markdown(rows, command), encoding="utf-8")
    return 0


def _row(name: str, zoo: dict) -> Row:
    if name not in zoo:
        return Row(name, "no tiny model in the zoo", "", Examination())
    return Row(name, *examined(zoo[name]))


if __name__ == "__main__":
    sys.exit(main())
