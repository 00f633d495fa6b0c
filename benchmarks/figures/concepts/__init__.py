"""The diagrams of docs/concepts.md and of the pages of methods, drawn by code."""

from pathlib import Path

from benchmarks.figures.concepts import attention, images, ranks, steps

FIGURES = {**attention.FIGURES, **images.FIGURES, **steps.FIGURES, **ranks.FIGURES}
"""Name -> the function that draws it."""


def draw(folder: Path, names: list[str] | None = None, kind: str = "svg") -> list[Path]:
    """Draws figures into a folder, as `concepts_<name>.<kind>`.

    Args:
        folder: is made if it is not there.
        names: of `FIGURES`; None: all.
        kind: "svg", or "png" to look at.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in names or FIGURES:
        files.append(folder / f"concepts_{name}.{kind}")
        FIGURES[name]().save(files[-1])
    return files
