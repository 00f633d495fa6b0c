"""The documentation as a whole: equations, links, and what must not stand in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.sources import ROOT, files

PAGES = files(".md")
ABOUT_CODE = ("README.md", "CONTRIBUTING.md", "docs/concepts.md", "docs/ops/kernels.md")
METHODS = ROOT / "docs" / "methods" / "index.md"

WIDTH = 100
ABSENT_PAGE = re.compile(
    r"\b(?:METHODS|DESIGN|FIELD|GPU|HF|STYLE)\.md\b|\b(?:METHODS|DESIGN)(?:'|,? section)"
)
CITED = re.compile(r"\(([SDKHCALETPWRGB]\d{1,2})\)")
DEFINED = re.compile(r"^\*\*\(([SDKHCALETPWRGB]\d{1,2})\)\*\*", re.MULTILINE)
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2|(`+).*?\3", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"\w*[A-Z]{3,}_[A-Z]+\w*")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _prose(text: str) -> str:
    """A page without its code; every line stays in its place."""
    return CODE.sub(lambda match: "\n" * match.group().count("\n"), text)


def test_equations_are_numbered_once() -> None:
    """A numbered equation of docs/methods/index.md is a line that begins with **(X1)**."""
    numbers = Counter(DEFINED.findall(_text(METHODS)))
    assert {"S1", "S5", "D1", "D4", "K1", "K4", "H1", "H4", "C1", "A2", "L2"} <= set(numbers)
    assert {number for number, times in numbers.items() if times > 1} == set()


def test_cited_equations_exist() -> None:
    numbers = set(DEFINED.findall(_text(METHODS)))
    cited = {
        (_named(path), number)
        for path in files(".py", ".cpp", ".h", ".inc", ".cu", ".md")
        for number in CITED.findall(_text(path))
    }
    assert ("groundkern/losses.py", "S4") in cited
    assert {(path, number) for path, number in cited if number not in numbers} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("equation (S1)", ["S1"]),
        ("(K1), (D3)", ["K1", "D3"]),
        ("an (A100) of NVIDIA, part (B), (S) and (L2 norm)", []),
    ],
)
def test_what_counts_as_a_citation(text: str, found: list[str]) -> None:
    assert CITED.findall(text) == found


def test_no_page_is_cited_that_is_not_here() -> None:
    for wrong in ("METHODS" + ".md section 3", "see METHODS" + " section 7", "DESIGN" + ".md"):
        assert ABSENT_PAGE.search(wrong)
    assert not ABSENT_PAGE.search("docs/methods/index.md, docs/ops/gpu.md")
    found = {
        f"{_named(path)}:{number}"
        for path in files(".py", ".cpp", ".h", ".inc", ".cu", ".md", ".toml", "")
        for number, line in enumerate(_text(path).splitlines(), 1)
        if ABSENT_PAGE.search(line)
    }
    assert found == set()


def test_no_placeholder_is_left() -> None:
    """Names in capitals with an underscore, such as environment variables, stand in backticks."""
    example = "`MAKE_FLAGS` and\n```\nTIME_LIMIT=1\n```\nGradCAM_COST, READ_ME"
    assert PLACEHOLDER.findall(_prose(example)) == ["GradCAM_COST", "READ_ME"]
    found = {_named(path): PLACEHOLDER.findall(_prose(_text(path))) for path in PAGES}
    assert {path: tokens for path, tokens in found.items() if tokens} == {}


def _too_long(line: str) -> bool:
    """Whether a line passes column 100 and could be broken: no row of a table, and not one word
    (a link, an address) after the indent and the mark of a list."""
    row = line.lstrip().startswith("|")
    words = re.sub(r"^[\s>]*(?:[-*+]|\d+\.|#+)?\s*", "", line).split()
    return len(line) > WIDTH and not row and len(words) > 1


def _written(text: str) -> str:
    """A page without what is quoted: blocks that a program writes into it, and fenced data or
    output, where a line is a line. Every other line stays in its place."""
    generated = r"(<!-- (\w+):begin -->\n).*?(?=<!-- \2:end -->)"
    fenced = r"^(`{3,}).*?^\1$"
    for block in (generated, fenced):
        text = re.sub(
            block, lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
        )
    return text


def test_lines_are_short() -> None:
    assert _too_long("word " * 21)
    assert not _too_long("| " + "word " * 21)
    long = "word " * 21
    assert _written(f"a\n```\n{long}\n```\n{long}") == f"a\n\n\n\n{long}"
    assert not _too_long("- [" + "x" * 60 + "](" + "y" * 60 + ")")
    found = {
        f"{_named(path)}:{number}"
        for path in PAGES
        for number, line in enumerate(_written(_text(path)).splitlines(), 1)
        if _too_long(line)
    }
    assert found == set()


PATH = re.compile(r"`((?:[\w.<>-]+/)*[\w.<>*-]+\.(?:py|md|h|cpp|inc|json|jsonl|txt|toml))`")


def _unknown_files(text: str, known: list[str]) -> set[str]:
    """Files that a page names and that are not in the repository, under any folder."""
    named = {name.replace("<op>", "side_attention") for name in PATH.findall(text)}
    return {n for n in named if not any(fnmatch(path, f"*/{n}") for path in known)}


def test_named_files_exist() -> None:
    """The pages about the code name files that are there; a shorter path will do."""
    suffixes = (".py", ".md", ".h", ".cpp", ".inc", ".json", ".toml", ".txt")
    known = [f"/{_named(path)}" for path in files(*suffixes)]
    assert _unknown_files("`losses.py`, `ops/<op>/cases.py`, `cpu/*.cpp`", known) == set()
    assert _unknown_files("`hf/losses.py` and `no.py`", known) == {"hf/losses.py", "no.py"}
    pages = [ROOT / name for name in ABOUT_CODE]
    found = {_named(page): _unknown_files(_text(page), known) for page in pages}
    assert {page: names for page, names in found.items() if names} == {}


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings; on the site equations and names too."""
    headings = re.findall(r"^#+ (.+)$", text.replace("`", ""), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | {*DEFINED.findall(text)} | {*re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def _links(path: Path) -> Iterator[str]:
    for target in LINK.findall(_prose(_text(path))):
        if not re.match(r"[a-z]+:", target):
            yield target


def test_links_lead_somewhere() -> None:
    broken = set()
    for path in PAGES:
        for target in _links(path):
            file, _, anchor = target.partition("#")
            page = (path.parent / file).resolve() if file else path
            if not page.exists() or (anchor and anchor not in _anchors(_text(page))):
                broken.add((_named(path), target))
    assert broken == set()
