"""docs/troubleshooting: every refusal of the sources has an entry, and quotes no other."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from tests.sentences import VALUE, Sentence, of_source, sentences, tables
from tests.sources import ROOT

PAGES = ROOT / "docs" / "troubleshooting"
QUOTES = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEAST = 4  # letters that a quote has beside values: it must be found by its words
OF_TABLES = ("groundkern/hf/data/geometry/__init__.py", "groundkern/trainer/arguments.py")

# Places whose sentences need no entry; those that are quoted must be there all the same.
EXEMPT = {
    "groundkern/checks.py": "the form itself: shapes, dtypes and devices",
    "groundkern/compat/": "arguments of functions called by hand; their docstrings list them",
    "groundkern/divergence/": "the same",
    "groundkern/ops/": "the same",
    "groundkern/parallel/": "the same",
    "groundkern/targets/": "the same",
    "groundkern/losses.py": "the same",
    "groundkern/maps.py": "the same",
    "groundkern/masses.py": "the same",
    "groundkern/metrics.py": "the same",
    "groundkern/rasters.py": "the same",
    "groundkern/row_blocks.py": "the same",
    "groundkern/selection.py": "the same",
    "groundkern/token_losses.py": "the same",
    "groundkern/hf/blip.py": "the same",
    "groundkern/hf/data/geometry/": "quoted by family of sentences; settings of one processor",
    "groundkern/trainer/demo/": "draws the demo; its options say what they take",
    "groundkern/trainer/drawing/": "the same",
    "groundkern/trainer/evidence/": "makes the study of docs/evidence.md again; for developers",
    "groundkern/trainer/prepare/": "of a record: file, field, wanted, got; the page has the form",
    "groundkern/trainer/metrics/": "of a record or an argument; `evaluate --help` lists them",
}

# An argument error that says all: a number out of range, a shape, one of some names.
ARGUMENT = re.compile(
    r"(?:.*`: )?expected (?:"
    r"an? (?:positive |finite |positive finite )?(?:number|whole number|share|float|bool|tensor)\b"
    r"|a positive|above 0|at least (?:one|…)|at most …, got|numbers? above|values (?:>= 0|in)"
    r"|finite numbers|shape |the shape of|….s leading shape|True or False|in \[|below …|\["
    r"|(?:one|some) of …|'[a-z_]+'(?:,| or)|…(?: or …)*,? got|….s shape|each a `Raster`"
    r"|\d or more|skip or stop|seconds above|… numbers|a number, or|numbers above|spreads above"
    r"|one box at least).*"
)

# Texts that hand on another's sentence, and an error of Python's own protocol.
CARRIERS = {
    "`training.arguments.…`: …",
    "command line: …",
    "… (and … more)",
    "`…`: … (and … more)",
    "`….…`: … (and … more)",
    "before …",
    "sample … of …",
}


@cache
def _sources() -> tuple[Sentence, ...]:
    found = sentences("groundkern")
    for name in OF_TABLES:
        found += tables(ROOT / name)
    return tuple(found)


@cache
def _quotes() -> dict[str, str]:
    """Every quoted sentence, and the page that has it."""
    return {
        line: str(path.relative_to(ROOT))
        for path in sorted(PAGES.glob("*.md"))
        for block in QUOTES.findall(path.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if path.name != "index.md"
    }


class Quote:
    """A quoted sentence, in which `…` is any text."""

    def __init__(self, text: str) -> None:
        self.words = [part for part in text.split(VALUE) if part]
        self.pattern = re.compile(".*".join(map(re.escape, text.split(VALUE))), re.DOTALL)

    def fits(self, text: str) -> bool:
        # the words first: most quotes are of other sentences
        return all(part in text for part in self.words) and bool(self.pattern.fullmatch(text))


def _reason(sentence: Sentence) -> str | None:
    """Why a sentence needs no entry."""
    for place, reason in EXEMPT.items():
        if sentence.path.startswith(place):
            return reason
    if sentence.text in CARRIERS:
        return "hands on another's sentence"
    return "an argument error that says all" if ARGUMENT.fullmatch(sentence.text) else None


def _uncovered(found: tuple[Sentence, ...], quotes: list[str]) -> list[str]:
    known = list(map(Quote, quotes))
    texts = {each.text for each in found if _reason(each) is None}
    missing = {text for text in texts if not any(quote.fits(text) for quote in known)}
    return [f"{path}:{line}: {text}" for path, line, text in found if text in missing]


def test_every_refusal_has_an_entry() -> None:
    missing = _uncovered(_sources(), list(_quotes()))
    assert not missing, (
        "sentences without an entry: quote each in a ```text block of the page of "
        "docs/troubleshooting that its user would open, with what to do below (or, if it can only "
        "be an argument that says all, see EXEMPT here):\n" + "\n".join(missing)
    )


def test_every_quote_is_in_the_sources() -> None:
    texts = {sentence.text for sentence in _sources()}
    gone = [
        f"{page}: {quote}"
        for quote, page in _quotes().items()
        if not any(map(Quote(quote).fits, texts))
    ]
    assert not gone, "no source says this any more:\n" + "\n".join(gone)


def test_quotes_can_be_found_by_their_words() -> None:
    quotes = _quotes()
    assert len(quotes) > 500
    vague = [
        quote
        for quote in quotes
        if sum(map(str.isalpha, re.sub("expected|got", "", quote))) < LEAST
    ]
    assert vague == []


def test_every_quote_stands_once_with_an_answer() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    blocks = [block for text in pages.values() for block in QUOTES.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line, times in Counter(lines).items() if times > 1] == []
    for path, text in pages.items():
        for behind in re.split(QUOTES, text)[2::2]:
            assert behind.strip() and not behind.strip().startswith("#"), (path, behind[:60])


def test_exempt_places_exist() -> None:
    for place in EXEMPT:
        assert (ROOT / place).exists(), place
        assert any(each.path.startswith(place) for each in _sources()), place


CASES = {
    'def f(x):\n    w = "a layer"\n    fail("model", w, x)': ["`model`: expected a layer, got …"],
    'def f(x):\n    w = "old one"\n    w = "new one"\n    fail(x, w, x)': [
        "`…`: expected new one, got …"
    ],
    'def f(x):\n    if x:\n        w = "one thing"\n    else:\n        w = "another"\n'
    '    raise ConfigError(f"{w} of {x}")': ["one thing of …", "another of …"],
    'def f():\n    for word in x:\n        fail("a", f"some {word}", 1)': [
        "`a`: expected some …, got 1"
    ],
    'def g(x):\n    logger.warning("%s is damaged: %d", x, 1)': ["… is damaged: …"],
    'def unsupported(x):\n    return None if x else "no such kernel"': ["no such kernel"],
    "def f(x):\n    raise ConfigError(str(x))": [],
    'def conflicts(x):\n    yield f"`{x}`: expected it off"': ["`…`: expected it off"],
}


@pytest.mark.parametrize(("source", "found"), CASES.items())
def test_reads_sentences(source: str, found: list[str]) -> None:
    assert [each.text for each in of_source(source, "x.py")] == found


def test_a_new_refusal_is_missed() -> None:
    new = Sentence("groundkern/hf/trainer.py", 1, "`model`: expected a unicorn, got …")
    other = Sentence("groundkern/hf/trainer.py", 1, "`depth`: expected a number in [0, 1), got …")
    assert _uncovered((new, other), list(_quotes())) == [f"{new.path}:1: {new.text}"]
