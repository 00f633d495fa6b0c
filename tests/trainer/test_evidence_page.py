"""The study's tables, pictures and page, and what a study takes from its page."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.evidence import curves, presets, tables
from groundkern.trainer.evidence.plan import Drawings, Preset, Study
from groundkern.trainer.evidence.runs import Desk
from groundkern.trainer.program import main
from tests.trainer.claiming import claims, over
from tests.trainer.test_evidence import points


@pytest.fixture
def finished(tmp_path):
    """Two seeds of plain and one of KLAL, as files."""
    study = Study("pages", Drawings("word_page"), ("plain", "klal"), steps=20, every=10)
    for method, seed, accuracies in (("plain", 0, (0, 0.5)), ("plain", 1, (0, 0.3)),
                                     ("klal", 0, (0, 0.9, 0.95))):  # fmt: skip
        at_end = {"attention_mass": 0.25}
        durable.write_json(
            tmp_path / "curves" / "pages" / method / f"{seed}.json",
            {
                "settings": study.settings(method, seed),
                "points": points(*accuracies),
                "at_end": at_end,
                "seconds": 1.0,
                "steps": 20,
            },
        )
    answers = ["a b", "a b", "c", "d e"]
    lines = [json.dumps({"messages": [{"role": "assistant", "content": a}]}) for a in answers]
    durable.write_text(study.folder(tmp_path) / "test.jsonl", "\n".join(lines))
    return tmp_path, Preset("x", (study,), seeds=2)


def test_a_page_gets_tables_picture_and_curves_between_its_marks(finished, tmp_path):
    output, preset = finished
    tables.write_tables(output, preset)
    tables.plot(output, preset, curves.stored(output, preset))
    page = tmp_path / "docs" / "page.md"
    durable.write_text(page, f"above\n{tables.MARKS[0]}\nold\n{tables.MARKS[1]}\nbelow\n")
    for _ in range(2):
        tables.put_on_page(page, output, preset)
        above, table, below = page.read_text().partition((output / "evidence.md").read_text())
        assert (above, below) == (f"above\n{tables.MARKS[0]}\n", f"{tables.MARKS[1]}\nbelow\n")
        assert "| plain |" in table
    kept = page.parent / "figures"
    assert sorted(path.name for path in kept.iterdir()) == [
        "evidence.json",
        "evidence.png",
    ]
    durable.write_text(page, "no marks")
    with pytest.raises(ConfigError, match="expected a file with the marks"):
        tables.put_on_page(page, output, preset)


def test_a_study_goes_on_from_the_curves_of_a_page(finished, tmp_path):
    output, preset = finished
    tables.write_tables(output, preset)
    page = tmp_path / "docs" / "page.md"
    known = curves.beside(page)
    durable.write_bytes(known, (output / curves.JSON).read_bytes())
    elsewhere = tmp_path / "elsewhere"
    (study,) = preset.studies
    durable.write_json(curves.path_of(elsewhere, "pages", "plain", 1), {"steps": 25, "mine": 1})
    child, told, end = claims(curves.path_of(elsewhere, "pages", "plain", 0))
    assert os.read(told, 9) == b"1 0"
    assert curves.take(page, elsewhere, preset) == 1  # none that another process makes,
    over(child, end)
    assert curves.take(page, elsewhere, preset) == 1  # and never one that is there
    assert curves.take(page, elsewhere, preset) == 0
    assert durable.read_json(curves.path_of(elsewhere, "pages", "plain", 1))["mine"] == 1
    for method in ("plain", "klal"):
        assert Desk(elsewhere, study).finished(method, 0)
        path = curves.path_of(elsewhere, "pages", method, 0)
        kept = durable.read_json(path)
        assert kept == durable.read_json(curves.path_of(output, "pages", method, 0))
    for other in (replace(study, batch_size=2), replace(study, steps=30)):
        assert curves.take(page, tmp_path / "x", replace(preset, studies=(other,))) == 0
    assert curves.take(tmp_path / "none.md", tmp_path / "x", preset) == 0
    assert curves.take(page, tmp_path / "new", preset) == 3
    tables.write_tables(tmp_path / "new", preset)  # what drawings said is known without them
    assert durable.read_json(tmp_path / "new" / curves.JSON)["guess"] == {"pages": 0.5}
    own = elsewhere / curves.JSON  # nor is it lost beside a study that never knew it
    durable.write_json(own, {**durable.read_json(own), "guess": {"pages": None, "other": 0.25}})
    assert curves.take(page, elsewhere, preset) == 0
    assert durable.read_json(own)["guess"] == {"pages": 0.5, "other": 0.25}
    older = durable.read_json(known)
    for curve in (c for methods in older["curves"]["pages"].values() for c in methods.values()):
        del curve["settings"]
    durable.write_json(known, older)
    assert curves.take(page, tmp_path / "x", preset) == 0


def test_one_process_at_a_time_writes_what_all_write(finished, tmp_path, monkeypatch):
    output, preset = finished
    page, lock = tmp_path / "docs" / "page.md", output / f"{curves.JSON}.lock"
    durable.write_text(page, "".join(tables.MARKS))
    monkeypatch.setitem(presets.PRESETS, "cpu", replace(preset, name="cpu"))
    write, held = durable.write_bytes, {}

    def watched(path, content):
        held[path.name] = lock.exists()
        write(path, content)

    monkeypatch.setattr(durable, "write_bytes", watched)
    assert main(["evidence", "--output", str(output), "--tables", "--page", str(page)]) == 0
    written = ("evidence.json", "evidence.csv", "evidence.md", "evidence.png", "page.md")
    assert all(held.pop(name) for name in written)
    assert not held
    assert not lock.exists()


def test_a_part_of_a_preset_leaves_the_rest_of_the_page(finished, tmp_path, monkeypatch, capsys):
    output, preset = finished
    monkeypatch.setitem(presets.PRESETS, "cpu", replace(preset, name="cpu"))
    monkeypatch.setitem(presets.PRESETS, "gpu", replace(preset, name="gpu"))
    page = tmp_path / "docs" / "page.md"
    durable.write_text(page, "".join(tables.MARKS))
    words = ["evidence", "--tables", "--page", str(page), "--output"]
    assert main([*words, str(output)]) == 0
    written = page.read_text()
    part = ["--methods", "klal", "--seeds", "1", "--studies", "pages"]
    assert main([*words, str(tmp_path / "new"), *part]) == 0
    assert page.read_text() == written
    assert "3 of 4 curves are done" in written
    assert main([*words, str(output), "--preset", "gpu"]) == 2
    assert "expected one of --preset gpu, got one of cpu" in capsys.readouterr().err
    assert page.read_text() == written


def test_the_docs_have_curves_of_the_settings_there_are():
    """A change of a setting must not leave its study's old curves in the page."""
    kept = durable.read_json(Path(__file__).parents[2] / "docs" / "figures" / curves.JSON)["curves"]
    studies = {study.name: study for study in presets.CPU.studies}
    for name, methods in curves.expanded(kept).items():
        for method, seeds in methods.items():
            for seed, curve in seeds.items():
                wanted = curves.digest(studies[name].settings(method, seed))
                assert curve["settings"] == wanted, (name, method, seed)


def test_the_page_in_docs_is_what_its_stored_curves_make():
    page = Path(__file__).parents[2] / "docs" / "evidence.md"
    kept = durable.read_json(page.parent / "figures" / curves.JSON)
    made = tables.markdown(presets.CPU, curves.expanded(kept["curves"]), kept)
    _, _, rest = page.read_text(encoding="utf-8").partition(tables.MARKS[0] + "\n")
    assert rest.partition(tables.MARKS[1])[0] == made


def test_tables_come_from_stored_curves(finished):
    output, preset = finished
    text = tables.write_tables(output, preset).read_text()
    assert "3 of 4 curves are done" in text
    assert "Always the same answer gets 0.500 right." in text
    assert "| plain | 2 | 0.400 | 0.400 | ≥ 15 (1 of 2) |" in text  # two seeds: no interval
    assert "≥ 15 (1 of 2) | never (0 of 2) |" in text
    assert "| KLAL, `predictor` | 1 | 0.900 | 0.950 | 10 (1 of 1) | 10 (1 of 1) | +0.450 |" in text
    with (output / "evidence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    compact = durable.read_json(output / "evidence.json")
    assert curves.expanded(compact["curves"])["pages"]["klal"][0]["points"][-1]["accuracy"] == 0.95
    assert tables.markdown(preset, curves.expanded(compact["curves"]), compact) == text
    assert all(len(line) <= 100 or line[0] == "|" for line in text.splitlines())
    assert tables.plot(output, preset, curves.stored(output, preset)).read_bytes()[:4] == b"\x89PNG"
    longer = replace(preset, studies=(replace(preset.studies[0], steps=30),))
    assert curves.stored(output, longer) == {}  # they do not have as many steps
