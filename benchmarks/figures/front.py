"""`python -m benchmarks.figures.front`: the README's first picture, from the committed curves.

Two tasks of docs/evidence.md: plain fine-tuning, a method, and the same method told about another
drawing. The PNG carries a fingerprint of the curves; `--check` fails if it was drawn from others.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from groundkern.trainer.evidence import curves
from groundkern.trainer.evidence.figures import accuracy_at

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
CURVES, FIGURE = FIGURES / curves.JSON, FIGURES / "front.png"
# study, its title, the last step shown, then method: (what it is called, where that stands)
PANELS = (
    (
        "word_pages",
        "Read the marked line of a page",
        1000,
        {
            "dv_sft": ("with DV-SFT", (440, 0.85)),
            "dv_sft_elsewhere": ("DV-SFT, another page's words", (330, 0.16)),
            "plain": ("plain fine-tuning", (330, 0.07)),
        },
    ),
    (
        "line_tracing",
        "Follow a line, read the number at its end",
        1500,
        {
            "klal_dv_sft": ("with KLAL + DV-SFT", (770, 0.87)),
            "klal_elsewhere_dv_sft": ("the same, another drawing's line", (560, 0.14)),
            "plain": ("plain fine-tuning", (560, 0.42)),
        },
    ),
)
STEP = 50  # between two looks at held-out answers
COLOURS = {"plain": "#5f6368", "told": "#00796b", "elsewhere": "#c8553d"}


def fingerprint() -> str:
    """A hash of the curves and of how they are shown."""
    shown = json.dumps(PANELS) + json.dumps(COLOURS)
    return hashlib.sha256(CURVES.read_bytes() + shown.encode()).hexdigest()


def draw(figure: Path) -> None:
    """Draws both panels: the mean of all seeds, and every seed as a thin line."""
    known = curves.expanded(json.loads(CURVES.read_text(encoding="utf-8"))["curves"])
    drawn, axes = plt.subplots(1, 2, figsize=(9.6, 3.1), dpi=150, layout="constrained")
    for axis, (study, title, last, methods) in zip(axes, PANELS, strict=True):
        for method, (label, place) in methods.items():
            told = "elsewhere" if "elsewhere" in method else "told"
            colour = COLOURS.get(method, COLOURS[told])
            seeds = [curve["points"] for curve in known[study][method].values()]
            steps = range(0, last + 1, STEP)
            values = np.array([[accuracy_at(points, step) for step in steps] for points in seeds])
            axis.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.3)
            style = "--" if told == "elsewhere" and method != "plain" else "-"
            axis.plot(steps, values.mean(0), style, color=colour, linewidth=2)
            axis.text(*place, f"{label} ({len(seeds)} seeds)", color=colour, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(xlim=(0, last), ylim=(-0.02, 1.03), xlabel="training steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("held-out answers right")
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(figure, metadata={"Curves": fingerprint()})
    plt.close(drawn)


def main() -> int:
    """Returns 1 if --check finds a figure of other curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures.front", description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        draw(FIGURE)
        return 0
    drawn = Image.open(FIGURE).text.get("Curves") if FIGURE.exists() else None
    if drawn == fingerprint():
        return 0
    print(f"{FIGURE.name} was drawn from other curves; run: {parser.prog}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
