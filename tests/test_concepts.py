"""docs/concepts.md: its diagrams are drawn by code, show what is true, and its example runs."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
import torch

import groundkern as gk
from groundkern.maps import inside, patch_grid
from tests.sources import ROOT

pytest.importorskip("matplotlib", reason="matplotlib draws the diagrams")
from benchmarks.figures import concepts
from benchmarks.figures.concepts import attention, example, images

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "docs" / "concepts.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))]
DRAWN_BY = re.search(
    r"^matplotlib==(\S+); python_version >=", (ROOT / "constraints.txt").read_text(), re.MULTILINE
)[1]


@pytest.mark.skipif(
    version("matplotlib") != DRAWN_BY,
    reason=f"the bytes are those of matplotlib {DRAWN_BY}, here is {version('matplotlib')}",
)
def test_the_command_makes_the_committed_diagrams(tmp_path) -> None:
    made = {path.name: path.read_bytes() for path in concepts.draw(tmp_path)}
    kept = {path.name: path.read_bytes() for path in FIGURES.glob("concepts_*.svg")}
    assert made.keys() == kept.keys()
    changed = [name for name, drawn in made.items() if drawn != kept[name]]
    assert changed == [], "python -m benchmarks.figures.concepts draws them again"


def test_every_diagram_is_on_a_page() -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    shown = {name for text in texts for name in re.findall(r"concepts_(\w+)\.svg", text)}
    assert shown == concepts.FIGURES.keys()


def test_the_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["out"].shape == (2, 8, 64) and names["lse"].shape == (2, 8)
    keys = {*example.LANGUAGE, *example.CAT}
    assert names["sets"].bits.tolist() == [[sum(1 << key for key in keys)]]
    full = gk.side_attention(names["rows"].take(names["q"]), names["k"], names["v"], names["rows"])
    assert torch.equal(full.lse[1], names["lse"][1])  # row 17 reads all that it sees
    assert (full.lse[0] > names["lse"][0]).all()  # row 16 does not


def test_the_diagrams_show_what_the_code_does() -> None:
    middle = torch.tensor([[0.26, 0.35, 0.74, 0.99]])  # the green box: the middle, at the bottom
    on = inside(patch_grid(example.ROWS, example.COLUMNS), boxes=middle)
    assert tuple((on.nonzero()[:, 0] + example.VISUAL.start).tolist()) == example.CAT
    visual, region = torch.zeros(2, 1, example.LENGTH, dtype=torch.bool)
    visual[:, list(example.VISUAL)] = True
    region[:, list(example.CAT)] = True
    keys = torch.arange(example.LENGTH)
    allowed = (~visual | region)[0] & (keys <= example.PREDICTS_CAT)
    assert tuple(keys[allowed].tolist()) == attention.ALLOWED_KEYS


@pytest.mark.long
def test_the_labels_of_the_page_are_those_of_the_tokenizer() -> None:
    vocabularies = pytest.importorskip("benchmarks.labels.vocabularies")
    labels = pytest.importorskip("groundkern.hf.data.labels")
    try:
        tokenizer = vocabularies.tokenizer("Qwen2 / 2.5 / 3")
    except vocabularies.Missing as missing:
        pytest.skip(str(missing))
    encoder = labels.WordEncoder(tokenizer)
    for word, shown in images.LABELS.items():
        found = encoder.encode(word).labels
        assert [tokenizer.decode([label.token]) for label in found] == shown
