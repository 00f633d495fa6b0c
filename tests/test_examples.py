"""The examples: short, runnable as they are, and saying what their pages promise."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.examples_run import EXAMPLES, SECONDS

ROOT = Path(__file__).parent.parent
FILES = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = EXAMPLES / "notebooks"
NAMES = ("tour_of_the_ops", "from_a_receipt_to_a_grounded_model")
COMMANDS = {  # in this order: `look` takes the model that `hf_trainer` has trained
    "raw_ops": "",
    "hf_trainer": "--steps 10",
    "look": "--model out/hf_trainer --answer 'a b'",
    "trl_sft": "--steps 5",
    "bare_loop": "--steps 5",
    "lora_one_image": "",
    "text_lm_linear_ce": "--steps 2",
    "context_parallel": "",
}
FEW = 1e-4


def numbers(text: str, pattern: str) -> list[float]:
    """The groups of the only line that fits a pattern, as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def logged(text: str, term: str) -> list[float]:
    """A term of each log line of a Trainer."""
    return [float(x) for x in re.findall(rf"'{term}': '([\d.e+-]+)'", text)]


def check_raw_ops(text: str, folder: Path) -> None:
    found = re.findall(
        r"^.+: ([\d.]+), torch ([\d.]+), gradients differ by ([\de.+-]+)$", text, re.M
    )
    assert len(found) == 3
    for ours, theirs, gap in found:
        assert float(ours) == pytest.approx(float(theirs), rel=FEW) and float(gap) < FEW


def check_hf_trainer(text: str, folder: Path) -> None:
    for term in ("text", "map_kl", "word", "smam_grounding", "smam_cross_entropy"):
        assert len(logged(text, term)) == 2, term
    loss = logged(text, "loss")
    assert loss[-1] < loss[0]
    assert {"model.safetensors", "tokenizer.json"} <= set(os.listdir(folder / "out/hf_trainer"))


def check_look(text: str, folder: Path) -> None:
    found = re.findall(r"probability ([\d.]+), most attention in ([\d.]+)", text)
    assert len(found) >= 3 and all(0 <= float(x) <= 1 for pair in found for x in pair)
    width, height = Image.open(folder / "look.png").size
    assert width > 3 * height


def check_trl_sft(text: str, folder: Path) -> None:
    assert len(logged(text, "map_kl")) == len(logged(text, "smam_grounding")) == 1
    assert logged(text, "loss")[0] > 0


def check_bare_loop(text: str, folder: Path) -> None:
    at_once, apart = numbers(text, r"gradient of 8 samples: ([\d.]+) at once, ([\d.]+) in micro")
    assert at_once == pytest.approx(apart, rel=FEW) and at_once > 0
    losses = [float(x) for x in re.findall(r"step \d+: text ([\d.]+), word", text)]
    assert len(losses) == 5 and losses[-1] < losses[0]


def check_lora_one_image(text: str, folder: Path) -> None:
    before, after = numbers(text, r"attention on the region: ([\d.]+) before, ([\d.]+) after")
    assert before < 0.3 and after > 0.7
    assert Image.open(folder / "lora_one_image.png").size == (3 * 224 + 20, 168)


def check_text_lm_linear_ce(text: str, folder: Path) -> None:
    ours, theirs = numbers(text, r"loss ([\d.]+), with logits ([\d.]+)")
    assert ours == pytest.approx(theirs, rel=FEW)
    fused, full = numbers(text, r"above the start: (\d+) MiB, with logits (\d+) MiB")
    assert fused < full / 2
    assert len(logged(text, "loss")) == 2


def check_context_parallel(text: str, folder: Path) -> None:
    """tests/parallel compares its step with that of one process."""
    assert min(numbers(text, r"loss ([\d.]+), gradient ([\d.]+)")) > 0


def test_examples_say_what_they_should(tmp_path):
    """Each in its own process, within 60 seconds of CPU time."""
    assert set(COMMANDS) == {path.stem for path in FILES}
    missing = {"trl_sft"} if find_spec("trl") is None else set()
    commands = [f"{name} {words}" for name, words in COMMANDS.items() if name not in missing]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.examples_run", str(tmp_path), *commands],
        env=environment | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    results = json.loads(done.stdout)
    print(results)
    wrong = []
    for name, (status, seconds) in results.items():
        if name == "imports":
            continue
        text = (tmp_path / f"{name}.txt").read_text()
        try:
            assert status == 0 and seconds < SECONDS
            globals()[f"check_{name}"](text, tmp_path)
        except (AssertionError, ValueError) as error:
            wrong.append(f"{name} (status {status}, {seconds} s): {error}\n{text[-2000:]}")
    assert not wrong, "\n\n".join(wrong)
    if missing:
        pytest.skip(f"all others ran; these need a package that is not here: {sorted(missing)}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_alone(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}" in text.split('"""')[1], "its docstring says how to run it"
    assert not re.search(r"^\s*(from|import) (tests|benchmarks)\b", text, re.M)


def test_the_pages_name_every_example():
    for page in (EXAMPLES / "README.md", ROOT / "docs" / "examples.md"):
        text = page.read_text(encoding="utf-8")
        for name in (*(path.name for path in FILES), *(f"{name}.ipynb" for name in NAMES)):
            assert name in text, f"{page.name}: {name}"


def outputs(notebook) -> list[list[str]]:
    """The kinds of what each cell of code shows: a text, a table, a picture."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[" ".join(sorted(x.get("data", {"text": 0}))) for x in c.outputs] for c in cells]


def told(notebook) -> str:
    """All that a notebook prints."""
    shown = [x for cell in notebook.cells for x in cell.get("outputs", ())]
    return "".join(x.get("text") or x.get("data", {}).get("text/plain", "") for x in shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_as_its_source_says(name):
    """What is committed is made of the source, small, and tells nothing of the machine."""
    jupytext = pytest.importorskip("jupytext", reason="reads the notebooks' sources")
    nbformat = pytest.importorskip("nbformat", reason="reads notebooks")
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook, source = nbformat.read(path, 4), jupytext.read(path.with_suffix(".py"))
    wanted = [(cell.cell_type, cell.source) for cell in source.cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == wanted, (
        f"run `python examples/notebooks/build.py {name}`"
    )
    assert path.stat().st_size < 400_000
    assert sum("image/png" in kinds for cell in outputs(notebook) for kinds in cell) >= 4
    machine = re.search(r"/(tmp|root|home|work|usr)/|site-packages", told(notebook))
    assert machine is None, machine


def check_tour_of_the_ops(text: str) -> None:
    assert max(float(x) for x in re.findall(r"differen?[ct]\w* \D*(\d.*e-\d+)", text)) < FEW
    start, end = numbers(text, r"KL ([\d.]+) at the start, ([\d.]+) after")
    assert end < start / 5
    ours, theirs = numbers(text, r"loss ([\d.]+), with logits ([\d.]+)")
    assert ours == pytest.approx(theirs, rel=FEW)


def check_from_a_receipt_to_a_grounded_model(text: str) -> None:
    assert "24  samples with regions" in text and "8  samples with regions" in text
    kl = [float(x) for x in re.findall(r"map_kl ([\d.]+)", text)]
    assert kl[-1] < 0.8 * kl[0]
    before, after = (float(x) for x in re.findall(r"attention ratio +([\d.]+)", text))
    assert after > 1.5 * before


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    """It shows the same kinds of things as the committed one, with the same message."""
    for package in ("ipykernel", "jupytext", "nbclient", "nbformat"):
        pytest.importorskip(package, reason="runs notebooks")
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    executed = runpy.run_path(str(NOTEBOOKS / "build.py"))["executed"]
    notebook = executed(NOTEBOOKS / f"{name}.py", timeout=300)
    globals()[f"check_{name}"](told(notebook))
    committed = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    assert outputs(notebook) == outputs(committed)
