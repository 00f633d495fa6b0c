"""The demo command: plain and grounded from one start, and the figures it judges."""

from __future__ import annotations

import pytest
import torch

from trainer import comparison
from trainer import run_folder as folder
from trainer.__main__ import main
from trainer.comparison import checks, demo_configs
from trainer.config import differences
from trainer.demo.generate import corpus, generate
from trainer.demo.model import save_model


@pytest.fixture(autouse=True)
def _one_thread():
    """The model is too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PLAIN = {
    "pointing": {"answer_loss": 1.0, "number_accuracy": 0.2, "attention_ratio": 1.0},
    "page": {"answer_loss": 2.0, "peak_in_mask": 0.5, "word_accuracy": 0.0},
}


def outcome(grounded: dict) -> dict[str, bool]:
    return {check.what: check.holds for check in checks(PLAIN, grounded)}


def pointing(loss: float, number: float, ratio: float) -> dict[str, float]:
    return {"answer_loss": loss, "number_accuracy": number, "attention_ratio": ratio}


def page(loss: float, peak: float, word: float) -> dict[str, float]:
    found = {"answer_loss": loss, "peak_in_mask": peak, "word_accuracy": word}
    return {**found, "word_baseline": 0.1}


def test_checks_hold_just_above_the_limit_and_not_just_below():
    above = {"pointing": pointing(1.04, 0.41, 10.1), "page": page(2.09, 0.51, 0.11)}
    below = {"pointing": pointing(1.06, 0.39, 9.9), "page": page(2.11, 0.5, 0.1)}
    assert outcome(above) == dict.fromkeys(outcome(above), True)
    assert outcome(below) == dict.fromkeys(outcome(above), False)
    assert len(outcome(above)) == 6


def test_the_two_runs_differ_in_objectives_only(tmp_path):
    plain, grounded = demo_configs(tmp_path, ["--training.steps=7"])
    left, right = (config.model_dump(mode="json") for config in (plain, grounded))
    changed = differences(left, right, ignore=("objectives.", "training.output", "evaluation."))
    assert changed == []
    assert plain.training.steps == grounded.training.steps == 7
    assert all(section is None for _, section in plain.objectives)
    on = {name for name, section in grounded.objectives if section is not None}
    assert on == {"smam", "dv_sft", "klal"}


def test_demo_from_nothing_to_report(tmp_path, monkeypatch, capsys):
    made = []

    def make_small(data, *, samples):
        made.append(samples)
        generate(data, samples=samples, test={"pointing": 2, "page": 2, "chart": 2})
        save_model(data / "model", corpus(seed=0))

    monkeypatch.setattr(comparison, "make_demo", make_small)
    words = ["demo", "--output", str(tmp_path), "--samples", "8", "--training.steps", "2"]
    words += ["--training.batch_size", "2", "--evaluation.heatmaps", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "pointing: attention ratio" in said
    assert " hold" in said
    assert str(tmp_path / folder.REPORT) in said
    report = (tmp_path / folder.REPORT).read_text(encoding="utf-8")
    assert "with the same batches in the same order" in report
    before = [(tmp_path / run / folder.BEFORE).read_bytes() for run in ("plain", "grounded")]
    assert before[0] == before[1]
    rows = [folder.read_metrics(tmp_path / run)[0] for run in ("plain", "grounded")]
    assert "map_kl" in rows[1]
    assert "map_kl" not in rows[0]

    assert main(words) == 0
    assert "Using the data in" in capsys.readouterr().out
    assert made == [8]
