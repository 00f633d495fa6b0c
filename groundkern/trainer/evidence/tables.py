"""Stored curves to evidence.md, evidence.csv, evidence.json and evidence.png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import ConfigError
from groundkern.trainer.evidence.curves import JSON, Curves, beside, compact, stored
from groundkern.trainer.evidence.drawings import most_frequent
from groundkern.trainer.evidence.figures import Reached, Row, accuracy_at, table
from groundkern.trainer.evidence.plan import LEVELS, METHODS, Preset, Study
from groundkern.trainer.metrics.intervals import Interval

PICTURE = "evidence.png"
CLIP = "evidence_clip.png"  # of `clips`
MARKS = ("<!-- evidence -->", "<!-- /evidence -->")
WIDTH = 100
COLUMNS = """
Held-out answers right, mean over seeds with 95 % intervals from three seeds on (bootstrap over
seeds; Wilson's where every seed has 0 or 1). Steps to an accuracy are restricted means: a seed that
does not get there counts with all its steps, so that a mean (≥) of which some seeds fell short is a
lower bound. The gain is against plain on the same seeds; its p-value counts every switch of the
two sides of seeds (exact), so that five seeds cannot give less than .06.
""".strip()
_WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
_FEW = 3  # seeds below which an interval over seeds says nothing
_LOOKS = (  # figure of the end of a curve, its name in a table
    ("attention_argmax", "attention peak on target"),
    ("attention_mass", "attention on target"),
    ("word_accuracy", "visual labels right"),
)


def write_tables(output: Path, preset: Preset) -> Path:
    """Write evidence.json, evidence.csv and evidence.md from the curves that are done.

    Returns:
        The path of the Markdown tables.
    """
    curves = stored(output, preset)
    meta = {
        "preset": preset.name,
        "machine": folder.machine(),
        "versions": folder.versions(),
        "runs": len(list(preset.runs())),
        "guess": _guesses(output, preset),
    }
    durable.write_json(output / JSON, {**meta, "curves": compact(curves)})
    durable.write_text(output / "evidence.csv", _csv(preset, curves))
    path = output / "evidence.md"
    durable.write_text(path, markdown(preset, curves, meta))
    return path


def _guesses(output: Path, preset: Preset) -> dict[str, float | None]:
    """By study, of its drawings; where these are elsewhere, what is known since then."""
    known = {}
    if (output / JSON).is_file():
        known = durable.read_json(output / JSON)["guess"]
    found = {study.name: most_frequent(study.folder(output)) for study in preset.studies}
    return {name: known.get(name) if value is None else value for name, value in found.items()}


def markdown(preset: Preset, curves: dict[str, Curves], meta: dict[str, Any]) -> str:
    """One table for each study that has curves, and what its columns are."""
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    done = sum(len(seeds) for methods in curves.values() for seeds in methods.values())
    command = "groundkern evidence --output DIR"
    if preset.name != "cpu":
        command += f" --preset {preset.name}"
    made = f"`{command}`: {done} of {meta['runs']} curves are done. {meta['machine']}; {versions}."
    lines = [*wrap(made, WIDTH, **_WHOLE_WORDS), "", *wrap(COLUMNS, WIDTH, **_WHOLE_WORDS)]
    for study in preset.studies:
        if study.name in curves:
            lines += ["", *_section(study, curves[study.name], meta["guess"][study.name])]
    return "\n".join(lines) + "\n"


def check_page(page: Path, preset: Preset) -> tuple[str, str]:
    """What stands before and behind the marks of a page.

    Raises:
        ConfigError: a page that is not there, has no such marks, or has another preset's curves.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ConfigError(
            f"`page`: expected a file with the marks {' and '.join(MARKS)}, got {page}"
        )
    known = beside(page)
    name = durable.read_json(known).get("preset") if known.is_file() else None
    if name not in (None, preset.name):
        raise ConfigError(f"`page`: expected one of --preset {preset.name}, got one of {name}")
    return before, after


def put_on_page(page: Path, output: Path, preset: Preset) -> None:
    """Put evidence.md between the marks of a page, and pictures and curves in figures/ beside it.

    Raises:
        ConfigError: see `check_page`.
    """
    before, after = check_page(page, preset)
    table = (output / "evidence.md").read_text(encoding="utf-8")
    durable.write_text(page, f"{before}{MARKS[0]}\n{table}{MARKS[1]}{after}")
    for name in (JSON, PICTURE, CLIP):
        if name != CLIP or (output / name).is_file():  # no study on clips, no such picture
            durable.write_bytes(page.parent / "figures" / name, (output / name).read_bytes())


def _section(study: Study, curves: Curves, guess: float | None) -> list[str]:
    rows = table(curves, study.steps, study.methods)
    looks = [(n, title) for n, title in _LOOKS if any(n in row.at_end for row in rows)]
    half = study.steps // 2
    heads = [
        "method",
        "seeds",
        f"right at {half}",
        f"right at {study.steps}",
        *(f"steps to {level:g}" for level in LEVELS),
        f"gain at {study.steps}",
        *(title for _, title in looks),
    ]
    chance = "" if guess is None else f" Always the same answer gets {guess:.3f} right."
    lines = [f"## {study.name}", "", *wrap(study.described() + chance, WIDTH, **_WHOLE_WORDS), ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            METHODS[row.method].title,
            str(row.seeds),
            _of(row.halfway, row.seeds),
            _of(row.final, row.seeds),
        ]
        cells += [_steps(found) for found in row.reached]
        cells += [_gain(row), *(_number(row.at_end.get(name)) for name, _ in looks)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _of(found: Interval, seeds: int) -> str:
    if seeds < _FEW or math.isnan(found.low):
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _steps(found: Reached) -> str:
    if not found.seeds:
        return f"never (0 of {found.of})"
    known = not math.isnan(found.steps.low) and found.seeds == found.of >= _FEW
    spread = f" [{found.steps.low:.0f}, {found.steps.high:.0f}]" if known else ""
    bound = "" if found.seeds == found.of else "≥ "
    return f"{bound}{found.steps.value:.0f}{spread} ({found.seeds} of {found.of})"


def _gain(row: Row) -> str:
    if row.gain is None:
        return ""
    if row.seeds < _FEW or math.isnan(row.gain.low):
        return f"{row.gain.value:+.3f}"
    value, low, high, p_value = row.gain
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}], p = {p_value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _csv(preset: Preset, curves: dict[str, Curves]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["study", "method", "seed", "step", "accuracy", "loss"])
    for study in preset.studies:
        for method, seeds in curves.get(study.name, {}).items():
            for seed, curve in sorted(seeds.items()):
                for point in curve["points"]:
                    values = (point["step"], f"{point['accuracy']:.5g}", f"{point['loss']:.5g}")
                    writer.writerow([study.name, method, seed, *values])
    return text.getvalue()


def plot(output: Path, preset: Preset, curves: dict[str, Curves]) -> Path:
    """Answers right against steps, a panel for each study, every seed a thin line.

    Returns:
        The path of evidence.png.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "evidence: the picture needs matplotlib: pip install matplotlib"
        ) from None
    shown = [study for study in preset.studies if study.name in curves]
    across = min(3, max(1, len(shown)))
    down = max(1, -(-len(shown) // across))
    figure = Figure(figsize=(5.2 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, study in zip(axes, shown, strict=False):
        _panel(axis, study, curves[study.name])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    durable.write_bytes(output / PICTURE, picture.getvalue())
    return output / PICTURE


def _panel(axis: Any, study: Study, curves: Curves) -> None:
    names: Sequence[str] = [name for name in study.methods if curves.get(name)]
    steps = list(range(0, study.steps + 1, study.every))
    for number, name in enumerate(names):
        colour = "0.3" if name == "plain" else f"C{number - 1}"
        style = "--" if METHODS[name].title.startswith("control:") else "-"
        lines = [[accuracy_at(c["points"], s) for s in steps] for c in curves[name].values()]
        for line in lines:
            axis.plot(steps, line, style, color=colour, alpha=0.25, linewidth=0.8)
        middle = [sum(values) / len(values) for values in zip(*lines, strict=True)]
        label = f"{METHODS[name].title} ({len(lines)})".replace("`", "")
        axis.plot(steps, middle, style, color=colour, linewidth=2, label=label)
    axis.set_title(study.name, fontsize=9)
    axis.set_xlabel("steps", fontsize=8)
    axis.set_ylabel("held-out answers right", fontsize=8)
    axis.set_ylim(-0.03, 1.03)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
