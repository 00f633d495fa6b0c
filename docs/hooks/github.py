"""Pages are written in GitHub's Markdown, and link to files of the repository: mkdocs gets what it
understands of both.

- Pages outside of docs/ come in: CONTRIBUTING.md and its like as project/*, benchmarks/results as
  results/*. README.md does not: the site has a first page of its own.
- Links between pages lead to where these are on the site. A link to another file of the repository
  becomes its text, or leads to `repo_url` where mkdocs.yml has one.
- Lists and tables may follow a paragraph without a blank line, and nested lists be indented by two.
- A name with a star in mkdocs.yml's nav, `methods/*`, is every page of it that nav does not name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what is below on_page_markdown needs no mkdocs: tests/test_site.py
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"

CODE_OR_LINK = re.compile(
    r"(`+)(?!`).*?(?<!`)\1(?!`)|(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)", re.DOTALL
)
FENCE = re.compile(r" *(`{3,}|~{3,})")
ITEM = re.compile(r"( *)([-*+]|\d{1,3}[.)])( +)(?=\S)")
DELIMITER = re.compile(r" *\|?[ :|-]*-[ :|-]*\|[ :|-]*$")


def outside() -> dict[Path, str]:
    """The pages that lie outside of docs/, and the names they have on the site.

    README.md has that of the site's own first page, to which links to it lead.
    """
    top = {path: f"project/{path.stem.lower().replace('_', '-')}.md" for path in ROOT.glob("*.md")}
    top[ROOT / "README.md"] = "index.md"
    results = {path: f"results/{path.name}" for path in RESULTS.glob("*.md")}
    results[RESULTS / "README.md"] = "results/index.md"
    return top | results


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path, name in outside().items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    pages = sorted(file.src_uri for file in files.documentation_pages())
    config.nav = list(expanded(config.nav, pages, list(named(config.nav))))
    return files


def named(nav: list | dict | str) -> Iterator[str]:
    """The pages of a nav, stars among them."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from named(entry)


def expanded(nav: list, pages: list[str], taken: list[str]) -> Iterator:
    """A nav with the pages that its stars stand for."""
    for entry in nav:
        if isinstance(entry, dict):
            yield {
                title: list(expanded(of, pages, taken)) if isinstance(of, list) else of
                for title, of in entry.items()
            }
        elif "*" in entry:
            wanted = re.compile(re.escape(entry).replace(r"\*", "[^/]*"))
            yield from (page for page in pages if wanted.fullmatch(page) and page not in taken)
        else:
            yield entry


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or DOCS / page.file.src_uri)
    return rewritten_links(listed(markdown), source, page.file.src_uri, config.repo_url)


def rewritten_links(text: str, source: Path, name: str, repository: str | None) -> str:
    """A page with its links as the site needs them.

    Args:
        text: the page.
        source: the file that it is; links start from its folder.
        name: the page's name on the site.
        repository: the address of the repository, if any.
    """
    known = outside()

    def link(match: re.Match) -> str:
        label, target = match[2], match[3]
        if label is None or re.match(r"[a-z]+:|#|/", target):
            return match[0]
        file, _, anchor = target.partition("#")
        path = Path(os.path.normpath(source.parent / file))
        inside = path.is_relative_to(DOCS)
        if path in known:
            there = known[path]
        elif (inside and source.is_relative_to(DOCS)) or not path.exists():
            return match[0]  # for mkdocs to check
        elif inside:
            there = path.relative_to(DOCS).as_posix()
        elif repository:
            address = f"{repository.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()}"
            return f"{label}({address})"
        else:
            return label[1:-1]
        there = os.path.relpath(there, os.path.dirname(name) or ".")
        return f"{label}({there}{'#' if anchor else ''}{anchor})"

    return "".join(
        part if code else CODE_OR_LINK.sub(link, part) for code, part in fenced_parts(text)
    )


def fenced_parts(text: str) -> Iterator[tuple[bool, str]]:
    """A page cut into (whether it is fenced code, part)."""
    part: list[str] = []
    mark = ""
    for line in text.splitlines(keepends=True):
        fence = FENCE.match(line)
        if not mark and fence:
            yield False, "".join(part)
            part, mark = [line], fence[1]
        elif mark and fence and fence[1].startswith(mark) and line.strip() == fence[1]:
            yield True, "".join([*part, line])
            part, mark = [], ""
        else:
            part.append(line)
    yield bool(mark), "".join(part)


def listed(text: str) -> str:
    """A page with blank lines ahead of lists and tables, and lists nested by four columns."""
    lines: list[str] = []
    inside: list[int] = []  # the columns at which the text of the open lists' items begins
    fence, of_list = "", False  # of_list: the block since the last blank line began with an item
    given = text.split("\n")
    for line, following in zip(given, [*given[1:], ""]):
        mark, item = FENCE.match(line), None if fence else ITEM.match(line)
        indent = len(line) - len(line.lstrip())
        begins = not lines or not lines[-1].strip()
        if item and not begins and not of_list:
            # within a paragraph, only a bullet or the number 1 begins a list
            item = item if inside or item[2] in "-*+" or item[2][:-1] == "1" else None
        if line.strip() and not fence and (item or begins):
            while inside and indent < inside[-1]:
                inside.pop()
        table = not fence and line.lstrip().startswith("|") and DELIMITER.match(following)
        if not begins and (table or (item and not of_list)):
            lines.append("")
            begins = True
        of_list = bool(item) if begins and not fence else of_list
        if item:
            lines.append(" " * 4 * len(inside) + line[indent:])
            inside.append(len(item[0]))
            continue
        nested = inside and indent >= inside[-1]
        lines.append(" " * 4 * len(inside) + line[inside[-1] :] if nested else line)
        if mark:
            closes = fence and mark[1].startswith(fence) and line.strip() == mark[1]
            fence = "" if closes else fence or mark[1]
    return "\n".join(lines)
