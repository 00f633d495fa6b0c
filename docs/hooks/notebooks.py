"""A notebook that was run, as a page: its text, its code, and what each cell printed and drew.

The pictures go into the page. Which notebooks there are, github.py says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a test reads this without mkdocs
    from mkdocs.structure.pages import Page

COLOURS = re.compile(r"\x1b\[[\d;]*m")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    notebook = (page.file.abs_src_path or "").endswith(".ipynb")
    return as_markdown(markdown) if notebook else markdown


def as_markdown(text: str) -> str:
    """The Markdown of a notebook, which is JSON."""
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if picture := data.get("image/png"):
            yield f"![What this cell draws](data:image/png;base64,{''.join(picture).strip()})"
        elif shown := COLOURS.sub("", "".join(data["text/plain"])).rstrip():
            yield "```text\n" + "\n".join(line.rstrip() for line in shown.split("\n")) + "\n```"
