"""Checks of the built site: `python docs/hooks/check.py build/site`.

- Every link, image and anchor of every page leads to something on the site.
- Nothing is loaded from elsewhere, by pages, styles or scripts that name files.
- Every public name of groundkern has its place on an API page, read from the sources: the
  `__all__` of a package, the functions and classes of a module without one.
- No list or table is left as text, and every numbered equation has an anchor.

Links to other sites are listed, not followed.
"""

from __future__ import annotations

import ast
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    *("groundkern", "groundkern.losses", "groundkern.lse", "groundkern.maps"),
    *("groundkern.maps_in_time", "groundkern.metrics", "groundkern.hf", "groundkern.parallel"),
    *("groundkern.parallel.heads", "groundkern.compat.torch", "groundkern.compat.liger"),
    *("groundkern.compat.cut_cross_entropy",),
)
LOADS = {  # element: the attribute that makes a browser fetch something
    **dict.fromkeys(("audio", "embed", "iframe", "img", "script", "source", "video"), "src"),
    "link": "href",
}
NOT_FETCHED = {"canonical", "next", "prev", "alternate"}  # rel of <link>
ELSEWHERE = re.compile(r"(?:[a-z][a-z+.-]*:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?([^\"')\s;]+)")
LEFT_OVER = re.compile(r"^(?:[-*+] \S|\|.*\|$)", re.MULTILINE)
EQUATION = re.compile(r"^\*\*\(([A-Z]\d{1,2})\)\*\*", re.MULTILINE)
CODE = ("code", "math", "pre", "script", "style")


class Page(HTMLParser):
    """What a page links to and loads, its anchors, and lines of text that look like Markdown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.left_over: list[str] = []
        self._code = 0
        self._paragraph: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self._code += tag in CODE
        if tag == "p":
            self._paragraph = []
        classes = given.get("class", "").split()
        if "arithmatex" in classes:
            self.left_over.append("a formula")
        if "mermaid" in classes:
            self.loaded.append("//mermaid")  # the theme fetches what draws it
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        fetched = tag != "link" or not NOT_FETCHED & set(given.get("rel", "").split())
        if tag in LOADS and LOADS[tag] in given and fetched:
            self.loaded.append(given[LOADS[tag]])

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in CODE
        if tag == "p" and self._paragraph is not None:
            self.left_over += LEFT_OVER.findall("".join(self._paragraph))
            self._paragraph = None

    def handle_data(self, data: str) -> None:
        if self._paragraph is not None and not self._code:
            self._paragraph.append(data)


def problems_of(site: Path) -> tuple[list[str], Counter[str]]:
    """What is wrong with a site, one line each; and the links that lead elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found, elsewhere = [], Counter()
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: left as text: {line!r}" for line in page.left_over]
        found += [f"{name}: loads {url}" for url in page.loaded if ELSEWHERE.match(url)]
        for url in [*page.links, *page.loaded]:
            if ELSEWHERE.match(url):
                elsewhere[url] += 1
            elif not re.match(r"(?:mailto|data|javascript):", url):
                problem = _broken(url, path, site, pages)
                found += [f"{name}: {url}: {problem}"] if problem else []
    for path in site.rglob("*.css"):
        for url in IN_STYLES.findall(path.read_text(encoding="utf-8")):
            if ELSEWHERE.match(url):
                found.append(f"{path.relative_to(site)}: loads {url}")
    return found, elsewhere


def _broken(url: str, page: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link of a page, if anything."""
    parts = urlsplit(url)
    if page.name == "404.html" and parts.path.startswith("/"):
        there = site / parts.path.lstrip("/")
    elif parts.path.startswith("/"):
        return "starts from the root, which is none when opened from disk"
    else:
        there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if there.is_dir():
        there = there / "index.html"
    if not there.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and there in pages and anchor not in pages[there].anchors:
        return "no such anchor"
    return None


def public_names(module: str) -> Iterator[str]:
    """The public names of a module, with the module's name in front, without importing it."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(getattr(target, "id", "") == "__all__" for target in targets):
            yield from (f"{module}.{name}" for name in ast.literal_eval(node.value))
            return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{module}.{node.name}"


def integrations() -> list[str]:
    """The public modules of groundkern.integrations: with an `__all__`, or a page in docs/trainers.

    Others are what these share.
    """
    found = []
    for path in sorted((ROOT / "groundkern" / "integrations").glob("*")):
        source = path / "__init__.py" if path.is_dir() else path
        shown = ROOT / "docs" / "trainers" / f"{path.stem.replace('_', '-')}.md"
        if source.is_file() and (shown.is_file() or "\n__all__ = " in source.read_text()):
            found.append(f"groundkern.integrations.{path.stem}")
    return [name for name in found if not name.endswith("__init__")]


def inventory(path: Path) -> set[str]:
    """The names in an objects.inv: four lines of text, then lines that are compressed."""
    compressed = path.read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}


def undocumented(site: Path) -> list[str]:
    """Public names that no page of the API reference has."""
    there = inventory(site / "objects.inv")
    names = [name for module in (*PUBLIC, *integrations()) for name in public_names(module)]
    modules = {
        name for name in names if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()
    }
    return sorted(set(names) - modules - there)


def without_anchor(site: Path) -> list[str]:
    """Numbered equations of docs/ that the site has not, or not where they can be linked to."""
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    numbers = {number for text in texts for number in EQUATION.findall(text)}
    return sorted(n for n in numbers if not any(f'<p id="{n}">' in page for page in pages))


def main(site: Path) -> int:
    found, elsewhere = problems_of(site)
    found += [f"equation ({number}): no anchor" for number in without_anchor(site)]
    found += [f"{name}: on no page of the API reference" for name in undocumented(site)]
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages; links to other sites, not followed:")
    for url, times in sorted(elsewhere.items()):
        print(f"  {url}" + (f" ({times} times)" if times > 1 else ""))
    for problem in found:
        print(f"WRONG: {problem}", file=sys.stderr)
    print(f"{len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
