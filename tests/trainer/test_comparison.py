"""The demo command: plain and grounded from one start, and the figures it judges."""

from __future__ import annotations

import pytest
import torch

from groundkern.trainer import comparison
from groundkern.trainer import run_folder as folder
from groundkern.trainer.comparison import checks, demo_configs
from groundkern.trainer.demo.generate import corpus, generate
from groundkern.trainer.demo.model import save_model
from groundkern.trainer.differences import differences
from groundkern.trainer.program import main
from tests.trainer.test_report import task_figures


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


SAMPLES = 60


def both(left: float, right: float, samples: int = SAMPLES) -> list[comparison.Check]:
    """Checks of a contribution peak that is right in a share of the samples."""
    sides = [
        {"page": task_figures({"peak_in_mask": [float(i < x * samples) for i in range(samples)]})}
        for x in (left, right)
    ]
    return checks(*sides)


def test_a_check_holds_only_beyond_its_interval():
    (near,), (far,), (wrong,) = both(0.5, 0.52), both(0.5, 0.8), both(0.5, 0.4)
    assert (near.verdict, near.holds) == ("not sure", False)
    assert near.beyond.low <= 0 < near.beyond.value
    assert (far.verdict, far.holds) == ("yes", True)
    assert 0 < far.beyond.low < far.beyond.value < far.beyond.high
    assert (wrong.verdict, wrong.holds) == ("no", False)


def test_a_check_on_a_quarter_of_four_samples_does_not_hold():
    (few,) = both(0.0, 0.25, samples=4)
    assert (few.plain, few.grounded, few.verdict) == (0.0, 0.25, "not sure")
    (all_of_four,) = both(0.0, 1.0, samples=4)
    assert all_of_four.verdict == "not sure"


def test_every_limit_is_tested_on_the_samples_themselves():
    half = [float(i % 2) for i in range(SAMPLES)]
    noise = [(-1) ** i / 20 for i in range(SAMPLES)]
    plain = {"answer_loss": [1 + x for x in noise], "number_accuracy": [0.2 + x for x in noise]}
    right = {
        "answer_loss": [1.04 + x for x in noise],  # 1 % of the plain one below the limit
        "number_accuracy": [0.41 + 2 * x for x in noise],  # twice the plain one, sample by sample
        "attention_ratio": [10.1 + x for x in noise],
        "word_accuracy": half,
        "word_baseline": [0.1] * SAMPLES,
    }
    rest = dict.fromkeys(("attention_ratio", "word_accuracy"), [0.0] * SAMPLES)
    sides = checks_of(plain | rest, right)
    assert all(check.verdict == "yes" for check in sides), sides
    beyond = {check.what.partition(": ")[2]: check.beyond.value for check in sides}
    assert beyond == pytest.approx(
        {
            "visual label accuracy": 0.4,
            "answer loss": 0.01,
            "accuracy per coordinate": 0.01,
            "attention ratio": 0.1,
        }
    )
    worse = {"answer_loss": [1.06 + x for x in noise], "attention_ratio": [9.9 + x for x in noise]}
    sides = checks_of(plain | rest, right | worse)
    missed = [check.what for check in sides if check.verdict == "no"]
    assert missed == ["pointing: answer loss", "pointing: attention ratio"]


def checks_of(*sides: dict) -> list[comparison.Check]:
    return checks(*({"pointing": task_figures(side)} for side in sides))


def test_a_loss_that_is_no_number_does_not_hold():
    (check,) = checks({"page": {"answer_loss": 1.0}}, {"page": {"answer_loss": None}})
    assert check.verdict == "no"


def test_the_outcome_tells_what_fails_from_what_may_be_chance(capsys):
    comparison.show([*both(0.5, 0.8), *both(0.5, 0.52)])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 hold. not beyond chance: page: contribution peak on the target." in said
    comparison.show(both(0.5, 0.4))
    assert "0 of 1 hold. not: page: contribution peak" in capsys.readouterr().out
    comparison.show(both(0.5, 0.8))
    assert "All 1 hold." in capsys.readouterr().out


def test_the_two_runs_differ_in_objectives_only(tmp_path):
    plain, grounded = demo_configs(tmp_path, ["--training.steps=7"])
    left, right = (config.model_dump(mode="json") for config in (plain, grounded))
    changed = differences(left, right, ignore=("objectives.", "training.output", "evaluation."))
    assert changed == []
    assert plain.training.steps == grounded.training.steps == 7
    assert all(section is None for _, section in plain.objectives)
    on = {name for name, section in grounded.objectives if section is not None}
    assert on == {"smam", "dv_sft", "klal"}


def test_figures_are_of_the_test_set_unless_settings_are_being_chosen(tmp_path):
    for config in demo_configs(tmp_path, []):
        assert config.data.test == tmp_path / "data" / "test.jsonl"
    for config in demo_configs(tmp_path, [f"--data.test={tmp_path}/data/dev.jsonl"]):
        assert config.data.test == tmp_path / "data" / "dev.jsonl"


def test_demo_from_nothing_to_report(tmp_path, monkeypatch, capsys):
    made = []

    def make_small(data, *, samples):
        made.append(samples)
        generate(data, samples=samples, held_out={"pointing": 2, "page": 2, "chart": 2})
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
