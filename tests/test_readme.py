"""The README's snippets run unchanged, and the paths it names exist."""

import re
from pathlib import Path

import pytest

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from groundkern.hf import detach
from groundkern.trainer.command_line import parse_flags
from tests.hf.collating import make_example, make_region

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_raw_ops_run() -> None:
    names: dict = {}
    exec(_blocks("python")[0], names)
    assert names["out"].shape == (3, 16, 64)
    assert names["kl"].shape == (3,)
    assert all(names[n].grad.isfinite().all() for n in "qkv")


def test_the_training_loop_runs() -> None:
    answer = "the red patch"
    model = tiny_qwen_model().train()
    examples = [make_example(answer, regions=[make_region(answer, "red patch")])]
    names = {"model": model, "processor": tiny_qwen_processor(), "examples": examples}
    exec(_blocks("python")[1], names)
    detach(model)
    promised = re.search(r"each term by itself: (.*)", README)[1].split(", ")
    assert set(names["output"].parts) == set(promised)


def test_the_command_line_names_real_fields() -> None:
    arguments = re.search(r"--config my.yaml (.*)", _blocks("bash")[0])[1].split()
    assert parse_flags(arguments)  # raises at a word that is no field


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_tree_names_real_files() -> None:
    tree = README.split("## File tree")[1].split("```")[1]
    folder = ROOT
    for line in filter(str.strip, tree.splitlines()):
        names = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        base = ROOT if not line.startswith(" ") else folder
        for name in names.split():
            assert (base / name.replace("<op>", "side_attention").rstrip("/")).exists(), name
        if not line.startswith(" "):
            folder = ROOT / names.split()[0].rstrip("/")
