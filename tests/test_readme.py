"""The README's snippets run, what it names exists, and it stays short."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.figures import front
from groundkern.hf import detach
from groundkern.trainer.command_line import parse_flags
from tests.hf.collating import make_example, make_region

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def names() -> dict:
    """What the snippets take for granted."""
    answer = "the red patch"
    return {
        "model": tiny_qwen_model().train(),
        "processor": tiny_qwen_processor(),
        "samples": [make_example(answer, regions=[make_region(answer, "red patch")])],
    }


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_the_raw_ops_run() -> None:
    names: dict = {}
    exec(_blocks("python")[1], names)
    assert names["out"].shape == (3, 16, 64)
    assert names["kl"].shape == (3,)
    assert all(names[n].grad.isfinite().all() for n in "qkv")


def test_the_training_loop_runs(names) -> None:
    exec(_blocks("python")[0], names)
    detach(names["model"])
    promised = re.search(r"each term by itself: (.*)", README)[1].split(", ")
    assert set(names["output"].parts) == set(promised)


def test_what_the_diff_leads_to_runs(names, tmp_path, monkeypatch) -> None:
    """Its lines but the removed ones, on a model that is there already, for a step."""
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    (diff,) = _blocks("diff")
    assert _blocks("diff", HOME) == [diff]
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    for loader in ("AutoModelForImageTextToText", "AutoProcessor"):
        given = names["model" if "Model" in loader else "processor"]
        names[loader] = SimpleNamespace(from_pretrained=lambda path, given=given: given)
    names |= {"path": "", "TrainingArguments": TrainingArguments}
    exec(code.replace("max_steps=100", "max_steps=1, report_to='none', logging_steps=1"), names)
    assert names["trainer"].state.log_history[0]["map_kl"] > 0


def test_the_command_line_names_real_fields() -> None:
    commands = " ".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    (line,) = (line for line in commands if line.strip().startswith("groundkern train"))
    assert parse_flags(line.split()[2:])  # raises at a word that is no field


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_folders_are_there() -> None:
    folders = " ".join(re.findall(r"(?m)^(\w+/) {2,}", README)).split()
    assert {"groundkern/", "csrc/", "benchmarks/", "tests/", "docs/", "examples/"} == set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_first_picture_is_of_the_committed_curves(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["front", "--check"])
    assert front.main() == 0
    monkeypatch.setattr(front, "PANELS", front.PANELS[:1])
    assert front.main() == 1
