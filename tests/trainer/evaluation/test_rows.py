"""Rows of samples: appended, read back if whole, matched, counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundkern.trainer.durable import StorageError
from groundkern.trainer.evaluation import figures
from groundkern.trainer.evaluation.rows import (
    Rows,
    identity,
    is_answer,
    is_prediction,
    newest,
    read_rows,
)

A, B = identity(1), identity(2**64 - 1)


def answer(sample: int, line: str, text: str = "4") -> dict:
    said = {"prediction": text, "gold": ["4"], "tokens": 1, "ended": True}
    return {"sample": sample, "hash": line, **said}


def test_identities_are_those_of_lines():
    assert (A, B) == ("0000000000000001", "ffffffffffffffff")


def test_rows_come_back_and_a_torn_end_is_cut_before_more_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(path).add([answer(0, A), answer(1, B)])
    path.write_bytes(path.read_bytes() + b'{"sample": 2, "ha')
    assert [row["sample"] for row in read_rows(path, is_answer)] == [0, 1]
    Rows(path).add([answer(2, A)])
    assert [row["sample"] for row in read_rows(path, is_answer)] == [0, 1, 2]


def test_nothing_is_written_for_no_rows(tmp_path):
    Rows(tmp_path / "rows.jsonl").add([])
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": -1},
        {"sample": True},
        {"sample": 1.0},
        {"hash": "1"},
        {"hash": A.upper().replace("0", "A")},
        {"prediction": None},
        {"gold": "4"},
        {"gold": [4]},
        {"tokens": "1"},
        {"ended": 1},
        {"raw": 3},
        {"resized": 28},
        {"resized": [28]},
        {"resized": [28, 0]},
        {"resized": [28.0, 56]},
        {"error": 3},
    ],
)
def test_what_is_no_row_is_left_out_and_told(tmp_path, caplog, wrong):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**answer(0, A), **wrong}) + "\n" + json.dumps(answer(1, B)) + "\n")
    assert read_rows(path, is_answer) == [answer(1, B)]
    assert "rows.jsonl:1 is no row" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"x": 1}, {"x": [1]}, {"x": [1, -1]}, {"x": [1, "2"]}, {"x": [True, 1]}, [], None]
)
def test_figures_of_another_evaluation_are_checked(wrong):
    row = {**answer(0, A), "task": "t", "figures": {"x": [0.5, 1]}}
    assert is_prediction(row)
    assert not is_prediction({**row, "figures": wrong})


def test_a_row_of_another_line_does_not_count_and_an_answer_beats_an_error():
    error = {"sample": 0, "hash": A, "error": "broken"}
    late, other = answer(0, A, "5"), answer(1, A)
    assert newest(iter([error, answer(0, A)]), [A, B]) == {0: answer(0, A)}
    assert newest(iter([answer(0, A), error]), [A, B]) == {0: answer(0, A)}
    assert newest(iter([answer(0, A), late, other, answer(9, A)]), [A, B]) == {0: late}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_a_sentence(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    rows = Rows(tmp_path / "other.jsonl")
    rows.path = tmp_path / "rows.jsonl"
    with pytest.raises(StorageError, match="No space left"):
        rows.add([answer(0, A)])


def scored(line: str, task: str, **values: list[float]) -> dict:
    return {"hash": line, "task": task, "figures": values}


def test_figures_are_sums_over_counts_and_samples_without_a_value_are_left_out():
    rows = [
        scored(A, "a", cer=[1, 10], exact=[1, 1]),
        scored(B, "a", cer=[3, 2], exact=[0, 1]),
        scored(A, "b", cer=[0, 0]),
    ]
    found = figures.measured(rows)
    assert list(found) == ["a", "b", figures.ALL]
    assert found["a"]["cer"]["value"] == pytest.approx(4 / 12)
    assert (found["a"]["exact"]["value"], found["a"]["exact"]["samples"]) == (0.5, 2)
    assert found["b"] == {}
    assert found[figures.ALL]["cer"]["samples"] == 2


def test_equal_lines_are_matched_in_their_order():
    ours = [scored(A, "a", x=[1, 1]), scored(A, "a", x=[2, 1]), scored(B, "a", x=[3, 1])]
    theirs = [scored(A, "a", x=[5, 1]), scored(B, "a", x=[6, 1]), scored(B, "a", x=[7, 1])]
    pairs = figures.matched(ours, theirs)
    assert [(a["figures"]["x"][0], b["figures"]["x"][0]) for a, b in pairs] == [(1, 5), (3, 6)]


def test_a_difference_is_this_less_the_other_where_both_have_values():
    ours = [scored(identity(i), "a", x=[float(i > 1), 1], y=[1, 1]) for i in range(12)]
    theirs = [scored(identity(i), "b", x=[0.0, 1], z=[1, 1]) for i in range(12)]
    theirs[11]["figures"]["x"] = [0, 0]
    found = figures.differences(figures.matched(ours, theirs))
    assert list(found) == ["a"]
    assert list(found["a"]) == ["x"]
    gap = found["a"]["x"]
    assert (gap["of"], gap["other"], gap["samples"]) == (pytest.approx(9 / 11), 0, 11)
    assert gap["value"] == pytest.approx(9 / 11)
    assert gap["p_value"] == pytest.approx(2 / 2**9)  # McNemar, nine better and none worse
    assert 0 < gap["low"] < gap["value"] < gap["high"] <= 1
