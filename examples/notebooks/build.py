"""Run the notebooks, whose sources are the .py files beside this one, and write the .ipynb.

python examples/notebooks/build.py [NAME ...]

The sources are in jupytext's percent format, in which a change can be read. What a notebook prints
on stderr is progress and warnings of other packages, and is left out. A cell that begins with
`# %% figure="NAME.png"` draws a picture that docs/examples.md shows.
"""

from __future__ import annotations

import sys
from base64 import b64decode
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
FIGURES = FOLDER.parent.parent / "docs" / "figures"


def executed(source: Path, *, timeout: float = 600) -> nbformat.NotebookNode:
    """The notebook of a source with what its cells print and draw.

    Args:
        source: a .py file in percent format.
        timeout: seconds that a cell may take.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's are random
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
    for cell in notebook.cells:
        cell.metadata = {key: x for key, x in cell.metadata.items() if key == "figure"}
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # Pillow shows each picture twice
    return notebook


def save_figures(notebook: nbformat.NotebookNode) -> None:
    """Write the pictures that the documentation shows."""
    for cell in notebook.cells:
        if name := cell.metadata.get("figure"):
            (shown,) = (x.data for x in cell.outputs if "image/png" in x.get("data", ()))
            (FIGURES / name).write_bytes(b64decode(shown["image/png"]))


if __name__ == "__main__":
    sources = [path for path in FOLDER.glob("*.py") if path.name != "build.py"]
    for source in [FOLDER / f"{name}.py" for name in sys.argv[1:]] or sources:
        notebook = executed(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        save_figures(notebook)
