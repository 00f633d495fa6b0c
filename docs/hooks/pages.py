"""What a page has on the site alone: a description for search engines, and figures that open in
their full size at a click, as they do on GitHub.
"""

from __future__ import annotations

import re
from html import escape, unescape
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a test reads this without mkdocs
    from mkdocs.structure.pages import Page

FIGURE = re.compile(r'<p>(<img [^>]*?src="([^":]+\.(?:png|svg))"[^>]*>)</p>')
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
LONGEST = 160  # what search engines show


def on_page_content(html: str, page: Page, **_: object) -> str:
    page.meta.setdefault("description", escape(described(html)))  # the theme does not escape
    return FIGURE.sub(r'<p><a class="gk-figure" href="\2">\1</a></p>', html)


def described(html: str) -> str:
    """The first paragraph of a page that is a sentence, cut behind a word."""
    for found in PARAGRAPH.findall(html):
        text = " ".join(unescape(re.sub(r"<math.*?</math>|<[^>]+>", "", found)).split())
        if len(text) >= 40:
            break
    else:
        return ""
    if len(text) <= LONGEST:
        return text
    whole = text[:LONGEST].rpartition(". ")[0]
    return f"{whole}." if len(whole) >= 60 else text[: LONGEST - 1].rpartition(" ")[0] + " …"
