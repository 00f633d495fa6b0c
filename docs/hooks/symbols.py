"""What the API pages have besides mkdocstrings' own.

- The last line of a docstring, `Source: ...`, stands apart from the rest.
- docs/api/integrations.md has a section for each integration that is there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from check import integrations

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

SOURCE = re.compile(r"<p>Source: (.*?)</p>", re.DOTALL)
TITLES = {"lightning": "Lightning", "llama_factory": "LLaMA-Factory", "ms_swift": "ms-swift"}
OPTIONS = """
    options:
      heading_level: 3
      show_if_no_docstring: true
      show_root_heading: false
      show_root_toc_entry: false"""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri != "api/integrations.md":
        return markdown
    parts = [markdown]
    for module in integrations():
        name = module.rpartition(".")[2]
        parts.append(f"## {TITLES.get(name, name)}\n\n::: {module}{OPTIONS}")
    return "\n\n".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if not page.file.src_uri.startswith("api/"):
        return html
    if page.file.src_uri == "api/command-line.md":
        return f'<div class="gk-options">{html}</div>'
    return SOURCE.sub(r'<p class="gk-source"><b>Source</b> \1</p>', html)
