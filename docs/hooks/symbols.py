"""On API pages the last line of a docstring, `Source: ...`, stands apart from the rest."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

SOURCE = re.compile(r"<p>Source: (.*?)</p>", re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if not page.file.src_uri.startswith("api/"):
        return html
    return SOURCE.sub(r'<p class="gk-source"><b>Source</b> \1</p>', html)
