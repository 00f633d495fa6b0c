"""Run the notebooks, whose sources are the .py files beside this one, and write the .ipynb.

python examples/notebooks/build.py [NAME ...]

The sources are in jupytext's percent format, in which a change can be read. What a notebook prints
on stderr is progress and warnings of other packages, and is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


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
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.stem for path in FOLDER.glob("*.py") if path != Path(__file__)]:
        nbformat.write(executed(FOLDER / f"{name}.py"), FOLDER / f"{name}.ipynb")
