"""The documentation site: what `make docs` relies on, without building it."""

from __future__ import annotations

import re
import zlib
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.sources import ROOT, imported

HOOKS = ROOT / "docs" / "hooks"


@cache
def _hook(name: str) -> ModuleType:
    """A module of docs/hooks, which is no package: mkdocs takes files."""
    spec = spec_from_file_location(f"docs_hooks_{name}", HOOKS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_are_those_of_the_site() -> None:
    """Between pages as they are; from and to pages outside of docs/; to sources none."""
    rewritten_links = _hook("github").rewritten_links
    contributing = ROOT / "CONTRIBUTING.md"
    page = ROOT / "docs" / "scale" / "scale.md"
    cases = (
        (page, "[a](long.md#b) [c](#d) [e](https://f.g)", None),
        (page, "[rules](../../CONTRIBUTING.md#rooms)", "[rules](../project/contributing.md#rooms)"),
        (page, "[all](../../benchmarks/results/README.md)", "[all](../results/index.md)"),
        (page, "[`lse.py`](../../groundkern/lse.py) is", "`lse.py` is"),
        (page, "[two\nlines](../../setup.py)", "two\nlines"),
        (page, "`[x](../../setup.py)`\n```\n[x](../../setup.py)\n```\n", None),
        (page, "[not there](../../nothing.md)", None),  # mkdocs refuses it
        (contributing, "[a](docs/ops/gpu.md#b)", "[a](../ops/gpu.md#b)"),
        (contributing, "[README](README.md)", "[README](../index.md)"),
    )
    names = {page: "scale/scale.md", contributing: "project/contributing.md"}
    for source, text, wanted in cases:
        assert rewritten_links(text, source, names[source], None) == (wanted or text)
    address = "https://example.org/x"
    made = rewritten_links("[s](../../setup.py)", page, names[page], address)
    assert made == f"[s]({address}/blob/main/setup.py)"


@pytest.mark.parametrize(
    ("github", "wanted"),
    [
        ("text\n- a\n- b", "text\n\n- a\n- b"),
        ("text\n3. no list", "text\n3. no list"),
        ("text\n1. a\n2. b", "text\n\n1. a\n2. b"),
        ("- a\n  b\n  - c\n    d", "- a\n    b\n    - c\n        d"),
        ("- a\n\n  b\n- c", "- a\n\n    b\n\n- c"),
        ("- a\n\ntext\n  x", "- a\n\ntext\n  x"),
        ("text\n| a |\n|---|\n| b |", "text\n\n| a |\n|---|\n| b |"),
        ("text\n```\n- a\n| b |\n|---|\n```", "text\n```\n- a\n| b |\n|---|\n```"),
    ],
)
def test_lists_and_tables_are_githubs(github: str, wanted: str) -> None:
    listed = _hook("github").listed
    assert listed(github) == wanted


def test_a_star_is_every_page_that_nav_does_not_name() -> None:
    expanded = _hook("github").expanded
    named = _hook("github").named
    nav = [{"A": ["a/index.md", "a/*"]}, {"B": "b.md"}, "*"]
    pages = ["a/index.md", "a/x.md", "a/y.md", "b.md", "c.md"]
    made = list(expanded(nav, pages, list(named(nav))))
    assert made == [{"A": ["a/index.md", "a/x.md", "a/y.md"]}, {"B": "b.md"}, "c.md"]


def _site(folder: Path, body: str, *names: str) -> Path:
    """A site of one page, with an inventory of names."""
    (folder / "index.html").write_text(f'<html><body id="top">{body}</body></html>')
    lines = "".join(f"{name} py:function 1 api.html#$ -\n" for name in names)
    (folder / "objects.inv").write_bytes(b"# 1\n# 2\n# 3\n# 4\n" + zlib.compress(lines.encode()))
    return folder


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="#top">x</a><img src="data:image/png;base64,"><code>- a</code>', None),
        ('<a href="https://example.org">x</a>', None),  # listed, not loaded
        ('<a href="other.html">x</a>', "no such file"),
        ('<a href="index.html#bottom">x</a>', "no such anchor"),
        ('<a href="/index.html">x</a>', "starts from the root"),
        ('<img src="figure.png">', "no such file"),
        ('<script src="https://example.org/x.js"></script>', "loads"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads"),
        ('<pre class="mermaid">', "loads"),
        ("<p>text\n- item</p>", "left as text"),
        ("<p>| a | b |</p>", "left as text"),
        ('<span class="arithmatex">x</span>', "left as text"),
    ],
)
def test_the_check_finds(tmp_path: Path, body: str, problem: str | None) -> None:
    problems_of = _hook("check").problems_of
    found, _ = problems_of(_site(tmp_path, body))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_styles_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    problems_of = _hook("check").problems_of
    (tmp_path / "a.css").write_text('x {src: url("../f.woff2")} y {src: url(https://example.org)}')
    found, _ = problems_of(_site(tmp_path, ""))
    assert found == ["a.css: loads https://example.org"]


def test_the_check_misses_no_public_name(tmp_path: Path) -> None:
    undocumented = _hook("check").undocumented
    missing = undocumented(_site(tmp_path, "", "groundkern.side_attention"))
    assert {"groundkern.attention_map", "groundkern.hf.attach", "groundkern.losses.smam"} <= {
        *missing
    }
    assert not {"groundkern.side_attention", "groundkern.losses"} & {*missing}


def test_every_public_name_is_on_an_api_page() -> None:
    """As `make docs` finds it out from the site, here from the pages' directives."""
    PUBLIC = _hook("check").PUBLIC
    public_names = _hook("check").public_names
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    named = {name for text in pages for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    names = {name for module in PUBLIC for name in public_names(module)} - set(PUBLIC)
    assert len(names) > 100
    assert {n for n in names if n not in named and n.rpartition(".")[0] not in named} == set()


def test_the_options_are_those_of_the_parsers() -> None:
    """`make docs-options` writes them anew."""
    PAGE = _hook("options").PAGE
    page = _hook("options").page
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    assert "\n| `beta` | slope of the grounding loss (S4) | `float` | `0.1` |\n" in text
    assert page(text.replace("slope of", "steepness of")) == text


def test_the_site_needs_nothing_of_the_library() -> None:
    """Its own folder of packages has no torch; `options` runs with the library's."""
    used = {
        name.partition(".")[0]
        for path in HOOKS.glob("*.py")
        if path.name != "options.py"
        for name in imported(path.read_text(encoding="utf-8"), set())
    }
    assert "mkdocs" in used
    assert not {"groundkern", "numpy", "pydantic", "torch"} & used


LONG = "A sentence of seventy letters, which is long enough to stand by itself."


@pytest.mark.parametrize(
    ("html", "wanted"),
    [
        (
            "<p>Short.</p><p>A sentence that is longer, where <code>x &gt; 0</code> is\nsaid.</p>",
            "A sentence that is longer, where x > 0 is said.",
        ),
        (f"<p>{LONG} {'word ' * 40}</p>", LONG),
        (f"<p>{'word ' * 40}</p>", "word " * 31 + "…"),
        ("<h1>x</h1>", ""),
    ],
)
def test_a_description_is_the_first_sentence(html: str, wanted: str) -> None:
    assert _hook("pages").described(html) == wanted


def test_figures_open_at_a_click() -> None:
    on_page_content = _hook("pages").on_page_content
    page = SimpleNamespace(meta={})
    made = on_page_content('<p><img alt="a" src="../figures/a.png" /></p>', page)
    assert made.startswith('<p><a class="gk-figure" href="../figures/a.png"><img alt="a"')
    kept = '<p>text <img src="a.png" /></p><p><img src="data:image/png;base64,a" /></p>'
    assert on_page_content(kept, page) == kept


def test_a_description_may_have_quotes() -> None:
    page = SimpleNamespace(meta={})
    _hook("pages").on_page_content('<p>The question is "what is it?", and the answer.</p>', page)
    assert page.meta["description"].startswith("The question is &quot;what is it?&quot;")
