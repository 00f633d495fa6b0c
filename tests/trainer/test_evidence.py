"""The evidence: what applies, tables of known runs, a tiny run that is not made twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from groundkern.hf.data.concepts import composites
from trainer import durable
from trainer import run_folder as folder
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.data.sample import parse_sample
from trainer.evidence import runs, tables
from trainer.prepare.maps.tasks import TASKS

FIELDS = {"grid_patch": {"regions", "phrases"}, "line_tracing": {"regions", "words"}}


def test_methods_run_where_their_supervision_is(monkeypatch):
    monkeypatch.setattr(runs, "fields_of", lambda plan, task: FIELDS[task])
    plan = runs.Plan(Path("x"), tasks=tuple(FIELDS), methods=("klal", "dv_sft", "hist", "all"))
    assert plan.pairs() == [
        ("grid_patch", "plain"),
        ("grid_patch", "klal"),
        ("grid_patch", "hist"),
        ("grid_patch", "all"),
        ("line_tracing", "plain"),
        ("line_tracing", "klal"),
        ("line_tracing", "dv_sft"),
        ("line_tracing", "all"),
    ]
    everything = runs.run_config(plan, "line_tracing", "all", 0).objectives
    assert everything.hist is None
    assert everything.dv_sft is not None
    eager = runs.run_config(plan, "grid_patch", "hist_gradcam", 0)
    assert eager.model.attn_implementation == "eager"


@pytest.mark.parametrize("task", ["grid_patch", "word_page"])
def test_answers_of_two_parts_get_phrases_and_their_composite(task, tmp_path):
    for seed in range(20):
        image, sample = TASKS[task](seed, size=224, difficulty="easy")
        image.save(tmp_path / "a.png")
        record = {**runs.with_phrases(sample), "images": ["a.png"]}
        found = parse_sample(record, root=tmp_path, where="here").phrases
        answer = sample["messages"][-1]["content"]
        if len(answer.split()) < 2:
            assert not found
            continue
        assert composites(found) == [(0, 1, 2)]
        halves = [answer[p.start : p.stop] for p in found[1:]]
        assert " ".join(halves) == answer
        assert [answer[slice(*p.subject)] for p in found[1:]] == [h.split()[0] for h in halves]


@pytest.fixture
def finished(tmp_path):
    """A plan and the results of two seeds of two methods."""
    plan = runs.Plan(tmp_path, tasks=("grid_patch",), seeds=2)
    held_out = tmp_path / "data" / "grid_patch" / "test.jsonl"
    held_out.parent.mkdir(parents=True)
    answers = ["row 1 column 1", "row 1 column 1", "row 2 column 1", "row 4 column 3"]
    lines = [json.dumps({"messages": [{"role": "assistant", "content": a}]}) for a in answers]
    held_out.write_text("\n".join(lines))
    accuracy = {("plain", 0): 0.25, ("plain", 1): 0.35, ("klal", 0): 0.5, ("klal", 1): 0.9}
    results = [
        {
            "task": "grid_patch",
            "method": method,
            "seed": seed,
            "figures": {"answer_accuracy": value, "samples": 4},
        }
        for (method, seed), value in accuracy.items()
    ]
    return plan, results


def test_tables_hold_mean_and_spread(finished):
    plan, results = finished
    text = tables.write_tables(plan, results, "python -m trainer evidence").read_text()
    assert "| plain | 0.300 ± 0.071 |" in text
    assert "| klal | 0.700 ± 0.283 |" in text
    assert "Always the most frequent answer: 0.500 right." in text
    with (plan.output / "evidence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mean"] for row in rows] == ["0.3", "0.7"]
    assert rows[1]["values"] == "0.5 0.9"
    assert durable.read_json(plan.output / "evidence.json") == results
    assert tables.plot(plan, results).read_bytes()[:4] == b"\x89PNG"


def test_a_single_seed_has_no_spread(finished):
    plan, results = finished
    assert "| klal | 0.500 |" in tables.markdown(plan, tables.cells(results[2:3]), "")


def test_bad_settings_are_one_sentence(tmp_path, capsys):
    start = ["evidence", "--output", str(tmp_path)]
    for words in (["--tasks", "maze"], ["--methods", "magic"], ["--steps", "0"]):
        assert main([*start, *words]) == 2
        assert f"`{words[0][2:]}`: expected" in capsys.readouterr().err


def test_a_run_is_made_once_and_never_mixed_with_others(tmp_path, monkeypatch, capsys):
    words = "--seeds 1 --steps 2 --batch-size 4 --samples 8 --test 4 --size 112"
    words = ["evidence", "--output", str(tmp_path), *words.split(), "--tasks", "grid_patch"]
    assert main([*words, "--methods", "klal"]) == 0
    text = (tmp_path / "evidence.md").read_text()
    assert "| plain |" in text
    assert "| klal |" in text
    assert (tmp_path / "evidence.png").exists()
    output = tmp_path / "runs" / "grid_patch" / "klal" / "0"
    assert not (output / folder.MODEL).exists()
    assert not list(output.glob("checkpoint-*"))
    (tmp_path / "evidence.md").unlink()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("trainer.train.train", never)
    assert main([*words, "--methods", "klal"]) == 0
    assert (tmp_path / "evidence.md").read_text() == text
    with pytest.raises(ConfigError, match="other settings"):
        runs.run(
            runs.Plan(tmp_path, ("grid_patch",), ("klal",), 1, 3, 4, samples=8, test=4, size=112),
            "grid_patch",
            "klal",
            0,
        )
    capsys.readouterr()
    assert main([*words, "--methods", "klal", "--samples", "9"]) == 2
    assert "other drawings" in capsys.readouterr().err
