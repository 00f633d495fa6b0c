"""Equations as MathML, made while the site is built; numbered ones can be linked to, and are.

The page that defines **(S1)** gets the anchor #S1 there; wherever another sentence cites (S1), a
docstring of the API pages too, it links to that. A formula that cannot be converted fails the
build.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

NUMBER = r"[A-Z]\d{1,2}"
DEFINED = re.compile(rf"^\*\*\(({NUMBER})\)\*\*", re.MULTILINE)
DEFINED_HTML = re.compile(rf"<p><strong>\(({NUMBER})\)</strong>")
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
CITED = re.compile(rf"\(({NUMBER})\)")
PAGE_NAME = re.compile(r"\bdocs/([\w/-]+\.md)\b")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
OPERATOR = re.compile(r"\\mathop\{\\mathrm\{(\w+)\}\}")
LIMITS = re.compile(r"\\mathop\{([^{}]*\{\w+\}\w*)\}\\limits_\{([^{}]*)\}")
TAG = re.compile(r"(<[^>]*>)")
# Inside of these, nothing becomes a link.
CLOSED = ("a", "button", "code", "h1", "h2", "math", "pre", "script", "style", "svg")

_converter = LatexToMathML(fancy_error=False)
_page_of: dict[str, str] = {}  # number of an equation: address of the page that defines it


def on_files(files: Files, config: MkDocsConfig) -> None:
    _page_of.clear()
    for file in files.documentation_pages():
        for number in DEFINED.findall(file.content_string):
            _page_of[number] = file.url


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    try:
        content = FORMULA.sub(_formula, content)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
    page.present_anchor_ids |= set(DEFINED_HTML.findall(content))
    content = DEFINED_HTML.sub(r'<p id="\1"><strong>(\1)</strong>', content)
    return linked(content, lambda text: _with_links(text, page, files))


def _formula(match: re.Match) -> str:
    display = match[2] == "["
    latex = html.unescape(match[3]).strip()
    try:
        made = mathml(latex, display)
    except LatexError as error:  # which says where
        raise ValueError(f"{latex!r}: {error}") from error
    tag = "div" if display else "span"
    return f'<{tag} class="gk-math" data-search-exclude>{made}</{tag}>'


def mathml(latex: str, display: bool) -> str:
    r"""A formula in MathML.

    Where GitHub wants `\mathop`, math_core has other names for operators and what stands below.
    """
    latex = OPERATOR.sub(r"\\operatorname{\1}", latex)
    latex = LIMITS.sub(r"\\underset{\2}{\1}\\,", latex)
    return _converter.convert_with_local_state(latex, displaystyle=display)


def linked(text: str, change: Callable[[str], str]) -> str:
    """HTML whose text, outside of `CLOSED` elements, went through a function."""
    parts, closed = [], 0
    for part in TAG.split(text):
        name = re.match(r"</?([\w-]+)", part)
        if not name:
            part = part if closed else change(part)
        elif name[1] in CLOSED:
            closed += -1 if part.startswith("</") else not part.endswith("/>")
        parts.append(part)
    return "".join(parts)


def _with_links(text: str, page: Page, files: Files) -> str:
    def equation(match: re.Match) -> str:
        there = _page_of.get(match[1])
        if there is None:
            return match[0]
        address = get_relative_url(there, page.url) if there != page.url else ""
        return f'<a class="gk-equation" href="{address}#{match[1]}">({match[1]})</a>'

    def name(match: re.Match) -> str:
        file = files.get_file_from_path(match[1])
        title = file and TITLE.search(file.content_string)
        if not title:
            return match[0]
        return f'<a href="{get_relative_url(file.url, page.url)}">{html.escape(title[1])}</a>'

    return CITED.sub(equation, PAGE_NAME.sub(name, text))
