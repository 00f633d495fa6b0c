"""report.html from hand-made run folders: it parses, holds its pictures and stands alone."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from groundkern.trainer import durable, report
from groundkern.trainer import run_folder as folder
from groundkern.trainer.metrics.tally import PER_SAMPLE, Tally
from tests.trainer.test_pictures import entry, receipt_entry

SAMPLES = 40
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects text and attributes, and checks that elements nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def task_figures(values: dict[str, list[float]], data: str = "d") -> dict:
    """A task's figures as `evaluate` returns them, of one value for each sample."""
    (samples,) = {len(one) for one in values.values()}
    tally = Tally(samples)
    tally.begin(range(samples), map(str, range(samples)))
    for name, one in values.items():
        tally.add(name, torch.tensor(one, dtype=torch.float64), torch.arange(samples))
    return tally.figures(data)


def write_run(output: Path, *, grounded: bool, ratio: float) -> Path:
    output.mkdir()
    terms = {"loss": 2.0, "text": 1.5} | ({"map_kl": 0.5} if grounded else {})
    rows = [
        {"step": step, "steps": 5, "epoch": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0}
        | {"samples_per_second": 9.0}
        | {name: value / step for name, value in terms.items()}
        for step in (5, 10, 15)
    ]
    (output / folder.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    objectives = {"smam": None, "dv_sft": None, "klal": {"weight": 1.0} if grounded else None}
    training = {"batch_size": 4, "accumulation": 2, "seed": 0, "learning_rate": 1e-3}
    record = {
        "versions": {"python": "3.11", "groundkern": "0.1"},
        "machine": "a machine",
        "config": {
            "model": {"path": "m", "lora": None},
            "data": {"train": "train.jsonl"},
            "objectives": objectives,
            "training": training,
        },
        "parameters": 1000,
        "trained_parameters": 900,
        "steps": 15,
        "seconds": 3.0,
        "continued_from": None,
        "samples": {"train": 1234, "test": 8},
        "bad_samples": {
            "train": {"count": 30, "first": [{"where": "train.jsonl:7", "reason": "<b>bad"}]},
            "test": {"count": 0, "first": []},
        },
        "supervision": {"regions": 5, "words_dropped_long": 2},
        "final_losses": {"loss": 0.1},
    }
    spread = [(-1) ** i / 2 for i in range(SAMPLES)]

    def figures(ratio: float) -> dict:
        found = {
            "answer_loss": [1.0 + x for x in spread],
            "attention_ratio": [ratio + x for x in spread],
            "word_accuracy": [0.5 + x for x in spread],
        }
        return task_figures(found | ({"word_baseline": [0.125] * SAMPLES} if grounded else {}))

    after = {"tasks": {"pointing": figures(ratio)}, "heat_maps": [entry()]}
    before = {"tasks": {"pointing": figures(1.0)}, "heat_maps": [entry()]}
    durable.write_json(output / folder.RECORD, record)
    durable.write_json(output / folder.AFTER, after)
    durable.write_json(output / folder.BEFORE, before)
    return output


@pytest.fixture
def runs(tmp_path):
    grounded = write_run(tmp_path / "grounded", grounded=True, ratio=12.0)
    return grounded, write_run(tmp_path / "plain", grounded=False, ratio=2.0)


def test_two_runs_side_by_side(runs):
    text = report.write_report(*runs).read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert "KLAL beside plain SFT" in words
    assert "with the same batches in the same order" in words
    assert "1,234 samples used, 30 bad samples skipped" in words
    assert "train.jsonl:7: <b>bad" in words
    assert "words dropped long 2" in words
    assert "most frequent label: 0.125" in words
    assert "Where <is> it?" in words
    for number in ("1.00", "2.00", "12.00"):
        assert number in page.text
    # the target, and attention and contribution of: before, plain SFT, KLAL
    assert len(page.values("img", "src")) == 1 + 2 * 3
    assert text.count("<svg") == 3
    assert page.values("td", "class") == ["best"]


def test_nothing_comes_from_outside(runs):
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    links = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert links
    inside = ("data:image/png;base64,", "data:image/webp;base64,", "#")
    assert all(link.startswith(inside) for link in links)
    assert not any("url(http" in value for _, _, value in page.attributes)


def test_a_run_alone_shows_before_and_after(runs):
    page = Page(report.write_report(runs[0]).read_text(encoding="utf-8"))
    assert page.values("img", "alt")[1:3] == ["attention, before training", "attention, KLAL"]


def test_a_run_without_held_out_data_still_reports(runs):
    for name in (folder.BEFORE, folder.AFTER):
        (runs[0] / name).unlink()
    page = Page(report.write_report(runs[0]).read_text(encoding="utf-8"))
    assert "There was no held-out data, so nothing was evaluated." in page.text
    assert page.values("img", "src") == []


def test_other_settings_are_not_called_the_same(runs):
    record = durable.read_json(runs[1] / folder.RECORD)
    record["config"]["training"]["seed"] = 1
    durable.write_json(runs[1] / folder.RECORD, record)
    said = report.sentences(report.load_run(runs[0]), report.load_run(runs[1]))
    assert "with other settings" in said[1]


def rows(*columns: dict[str, list[float]], **options) -> list[report.Row]:
    evaluations = [{"t": task_figures(column, **options)} for column in columns]
    return list(report._rows("t", evaluations))


def test_best_is_the_better_not_the_larger():
    low, high = ({"answer_loss": [x] * 30, "roc_auc": [x] * 30} for x in (0.2, 0.3))
    loss, auc = rows(low, high)
    assert (loss.best, auc.best) == (0, 1)
    assert [row.best for row in rows(low, low)] == [None, None]


def test_a_quarter_of_four_samples_is_not_better_than_none():
    """.250 against .000 of four samples."""
    none, one = [0.0] * 4, [1.0, 0.0, 0.0, 0.0]
    (row,) = rows({"answer_accuracy": none}, {"answer_accuracy": one})
    assert [cell.value for cell in row.cells] == ["0.000", "0.250"]
    assert row.best is None
    assert row.cells[0].interval == "[0.000, 0.490]"  # Wilson's, of 0 of 4


def test_few_samples_are_never_enough_however_far_apart():
    for samples, best in ((report.ENOUGH - 1, None), (report.ENOUGH, 1)):
        right, wrong = {"answer_accuracy": [1.0] * samples}, {"answer_accuracy": [0.0] * samples}
        (row,) = rows(wrong, right)
        assert row.best == best


def test_the_best_must_beat_the_best_of_the_others_and_not_the_worst():
    columns = [[0.0] * 100, [1.0] * 60 + [0.0] * 40, [1.0] * 62 + [0.0] * 38]
    (row,) = rows(*({"answer_accuracy": column} for column in columns))
    assert row.best is None
    columns[2] = [1.0] * 70 + [0.0] * 30
    (row,) = rows(*({"answer_accuracy": column} for column in columns))
    assert row.best == 2


def test_pairing_finds_what_the_intervals_of_each_side_cannot():
    hard = np.random.default_rng(0).normal(size=60)  # samples differ more than the runs do
    (row,) = rows({"answer_loss": list(hard + 5)}, {"answer_loss": list(hard + 4.9)})
    lows = [float(cell.interval.strip("[]").split(", ")[0]) for cell in row.cells]
    assert lows[0] < float(row.cells[1].value)  # each lies in the other's interval
    assert row.best == 1


def test_other_samples_are_not_paired(runs):
    evaluations = [
        {"t": task_figures({"answer_accuracy": [x] * 30}, data)} for x, data in ((0, "a"), (1, "b"))
    ]
    (row,) = report._rows("t", evaluations)
    assert row.best is None
    after = durable.read_json(runs[1] / folder.AFTER)
    after["tasks"]["pointing"][PER_SAMPLE]["of"] = "others"
    durable.write_json(runs[1] / folder.AFTER, after)
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    assert "The columns are of different samples" in " ".join(page.text)
    assert page.values("td", "class") == []


def test_where_a_model_looks_by_another_rule_is_not_put_beside(runs):
    """Before training and beside it is of a version that kept no rule; the answers still count."""
    after = durable.read_json(runs[0] / folder.AFTER)
    durable.write_json(runs[0] / folder.AFTER, {**after, "measured": {"map_rows": "predictor"}})
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    assert "measured by another rule" in " ".join(page.text)
    (table,) = report.tables(*map(report.load_run, runs)).values()
    labels = {row.label: row for row in table}
    ratio = labels["attention ratio (1 = looks anywhere)"]
    assert [cell and cell.value for cell in ratio.cells] == [None, None, "12.00"]
    assert all(labels["answer loss"].cells)
    assert "attention, before training" not in page.values("img", "alt")
    assert "attention, KLAL" in page.values("img", "alt")


def test_the_page_says_how_and_shows_an_interval_beside_each_figure(runs):
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.text).split())
    assert "95 % interval" in words
    assert "on the same samples, paired one by one, with p < 0.05" in words
    assert page.values("span", "class").count("interval") == 9  # three figures, three columns


def test_records_that_kept_means_only_still_report_without_intervals(runs):
    for run in runs:
        for name in (folder.BEFORE, folder.AFTER):
            record = durable.read_json(run / name)
            del record["tasks"]["pointing"][PER_SAMPLE]
            durable.write_json(run / name, record)
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    assert "12.00" in page.text
    assert "kept means only" in " ".join(page.text)
    assert page.values("td", "class") == []
    assert "interval" not in page.values("span", "class")


def test_a_metric_that_one_side_lacks_or_that_is_not_finite_has_no_best():
    (row,) = rows({"roc_auc": [0.5] * 30}, {"answer_loss": [1.0] * 30})[1:]
    assert (row.cells[1], row.best) == (None, None)
    evaluations = [{"t": task_figures({"answer_loss": [x] * 30})} for x in (float("inf"), 2.0)]
    evaluations = json.loads(json.dumps(durable.finite_or_none(evaluations)))  # as it is kept
    (row,) = report._rows("t", evaluations)
    assert row.cells[0] is None
    assert row.cells[1].interval == "[2.000, 2.000]"


def test_the_page_has_a_scale_for_each_row_of_pictures_and_close_ups_of_large_images(runs):
    for run in runs:
        for name in (folder.BEFORE, folder.AFTER):
            record = durable.read_json(run / name)
            record["heat_maps"] = [receipt_entry(attention=[0.002] * 1344)]
            del record["heat_maps"][0]["contribution"]
            durable.write_json(run / name, record)
    page = Page(report.write_report(*runs).read_text(encoding="utf-8"))
    assert len(page.values("img", "src")) == 2 * (1 + 3)
    assert page.values("img", "alt")[:3] == [
        "the target's surroundings",
        "the image with its target",
        "attention, before training, close up",
    ]
    assert page.values("div", "class").count("scale") == 1
    assert "0.008" in page.text  # four times the even map's value
