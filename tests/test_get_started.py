"""docs/get-started.md, as a newcomer copies it: every block runs, in its order, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from groundkern.trainer.config import Config
from groundkern.trainer.program import main

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "get-started.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"(?m)^## ", TEXT)}


def _blocks(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(section: str) -> dict:
    names: dict = {"__name__": "__main__"}
    for block in _blocks(section):
        exec(block, names)
    return names


def _last(trainer) -> set[str]:
    return set(trainer.state.log_history[-2])


def test_the_ops(capsys):
    names = _run("The ops, on tensors")
    assert names["side"].out.shape == (3, 16, 64)
    assert "KL [2." in capsys.readouterr().out
    assert names["q"].grad.abs().sum() > 0 and names["v"].grad is None  # a map reads no values


def test_transformers_trainer():
    names = _run("transformers' Trainer")
    assert {"text", "word", "map_kl"} <= _last(names["trainer"])
    names["sample"].check()
    assert names["answer"][names["start"] :][:5] == "41.80"


def test_trl():
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    names = _run("TRL's SFTTrainer")
    assert names["trainer"].state.global_step == 4 and "map_kl" in _last(names["trainer"])


def test_the_command_line(folder, capsys):
    section = "The command line, on LLaMA-Factory's file"
    _run(section)
    (block,) = _blocks(section, "bash")
    for line in block.replace("\\\n", " ").strip().splitlines():
        program, *words = shlex.split(line)
        assert program == "groundkern" and main(words) == 0, line
    assert {"inspect.html", "look.png"} <= {path.name for path in folder.iterdir()}
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["map_kl"] > 0
    assert "24 samples, 0 bad" in capsys.readouterr().out


def test_the_settings_file_of_the_command_lines_page():
    text = (DOCS / "trainers" / "command-line.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = Config.model_validate(yaml.safe_load(block))
    assert config.objectives.klal.weight == 1.0 and config.objectives.smam is None
