"""python -m benchmarks.figures.concepts: draws the diagrams into docs/figures."""

import argparse
from pathlib import Path

from benchmarks.figures.concepts import FIGURES, draw

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", type=Path, default=Path("docs/figures"))
parser.add_argument("--only", nargs="+", choices=FIGURES, help="some of the figures")
parser.add_argument("--png", action="store_true", help="PNG, to look at")
settings = parser.parse_args()
for path in draw(settings.output, settings.only, "png" if settings.png else "svg"):
    print(path)
