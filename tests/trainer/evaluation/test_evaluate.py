"""`groundkern evaluate` on a tiny model: answers, figures, files, continuing, comparing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import warnings
from functools import cache
from pathlib import Path

import pytest

from groundkern.trainer.evaluation import work
from groundkern.trainer.evaluation.generating import Answerer
from groundkern.trainer.evaluation.models import Named
from tests.trainer.evaluation.small import make, predictions, result, run, said, samples, write

REGIONS = 4  # samples with regions


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return make(tmp_path_factory.mktemp("held_out"))


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Models that are loaded once for all tests; test_models.py loads each anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Named, "load", cache(Named.load))
        yield


@pytest.fixture(scope="module")
def whole(where):
    """A finished evaluation."""
    output = where / "whole"
    assert run(where, output, full=True) == 0
    return output


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The size of every batch that a model is asked from here on."""
    sizes: list[int] = []
    answer = Answerer.answer

    def spy(self, inputs):
        sizes.append(len(inputs["input_ids"]))
        return answer(self, inputs)

    monkeypatch.setattr(Answerer, "answer", spy)
    return sizes


def test_every_sample_has_a_row_in_the_order_of_the_data(whole):
    rows = predictions(whole)
    assert [row["sample"] for row in rows] == list(range(len(samples())))
    assert [row["task"] for row in rows] == [sample["task"] for sample in samples()]
    assert [row["where"] for row in rows] == [f"test.jsonl:{i}" for i in range(1, 9)]
    assert len({row["hash"] for row in rows}) == len(rows)
    golds = [row["gold"] for row in rows]
    assert golds[4:] == [["The coal is gone."], ["1854"], ["It is a truth."], ["coal"]]
    assert rows[5]["question"] == "In which year?"
    assert all(row["prediction"] for row in rows)


def test_batches_answer_as_single_samples_do(where, whole, tmp_path):
    """Left padding, other lengths and other images beside it change no answer (fp32)."""
    assert run(where, tmp_path, "--batch-size", "1", "--failures", "0", full=True) == 0
    alone, together = predictions(tmp_path), predictions(whole)
    for one, other in zip(alone, together):
        assert one["prediction"] == other["prediction"]
        assert one["figures"].keys() == other["figures"].keys()
        for name, pair in one["figures"].items():
            assert pair == pytest.approx(other["figures"][name], rel=1e-4), name
    assert len({row["prediction"] for row in alone}) > 4  # they are not all the same


def test_where_it_looks_is_measured_on_samples_with_regions(whole):
    found = result(whole)
    looked = found["tasks"]["pointing"]["figures"]
    assert looked["attention_ratio"]["samples"] == REGIONS
    assert looked["attention_ratio"]["low"] < looked["attention_ratio"]["value"]
    assert {"attention_mass", "peak_in_mask", "roc_auc"} <= looked.keys()
    assert "gradcam_peak" not in looked
    assert "attention_ratio" not in found["tasks"]["reading"]["figures"]
    assert found["grounding_refused"] is None


def test_the_folder_holds_the_whole_evaluation(whole):
    found = result(whole)
    assert found["samples"] == 8
    assert found["settings"]["dtype"] == "float32"
    assert len(found["settings"]["model"]["weights"]) == 64
    assert list(found["tasks"]) == ["pointing", "reading", "all samples"]
    page = (whole / "report.html").read_text()
    assert "http" not in page
    assert page.count('<div class="sample">') == 8
    # attention and contributions of four, and the samples' images
    assert page.count("data:image/") == 4 * 2 + 4 + 2 + 1 + 0 + 2
    assert page.count('<input type="checkbox"') == 2


def test_no_warning_is_printed(where, tmp_path, capfd, recwarn):
    """Sampling settings saved with a model are laid aside without a word."""
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.5}
    saved = where / "model" / "generation_config.json"
    before = saved.read_text()
    try:
        saved.write_text(json.dumps({**json.loads(before), **settings}))
        assert run(where, tmp_path) == 0
    finally:
        saved.write_text(before)
    told = capfd.readouterr()
    assert not [line for line in told.err.splitlines() if line.strip()]
    assert not [w for w in recwarn if "generation" in str(w.message)]


def test_nothing_is_asked_twice(where, whole, tmp_path, asked):
    copied(whole, tmp_path)
    assert run(where, tmp_path) == 0
    assert asked == []
    assert answers(tmp_path) == answers(whole)


def test_gradcam_may_be_asked_for_later(where, whole, tmp_path, asked):
    copied(whole, tmp_path)
    assert run(where, tmp_path, "--failures", "0", full=True, flags=("--gradcam",)) == 0
    assert asked == []
    before = result(whole)["tasks"]["pointing"]["figures"]
    now = result(tmp_path)["tasks"]["pointing"]["figures"]
    assert now.keys() == before.keys() | {"gradcam_peak"}
    for name in ("attention_ratio", "peak_in_mask", "roc_auc"):
        assert now[name]["value"] == pytest.approx(before[name]["value"], rel=1e-5)


def test_rows_say_to_which_size_the_processor_brought_the_image(where, whole, tmp_path, asked):
    """These images are whole cells of 28 pixels already; a sample without one has no size."""
    sizes = [row.get("resized") for row in predictions(whole)]
    assert sizes == [[84, 56], [84, 84], [84, 56], [84, 84], [84, 56], [84, 56], None, [84, 84]]
    copied(whole, tmp_path)
    assert run(where, tmp_path, "--coord", "resized") == 0
    assert asked == []


def test_fewer_samples_can_become_more(where, whole, asked, tmp_path):
    assert run(where, tmp_path, "--samples", "1") == 0
    assert [row["sample"] for row in predictions(tmp_path)] == [0, 4]
    assert asked == [2]
    assert run(where, tmp_path) == 0
    assert sum(asked) == 8
    assert answers(tmp_path) == answers(whole)


def answers(output) -> list[str]:
    return [row["prediction"] for row in predictions(output)]


def test_a_stopped_evaluation_continues(where, whole, tmp_path, monkeypatch, capsys):
    answer, calls = Answerer.answer, []

    def stop_at_the_second(self, inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(self, inputs)

    monkeypatch.setattr(Answerer, "answer", stop_at_the_second)
    assert run(where, tmp_path) == 130
    told = capsys.readouterr().err
    assert f"saved in {tmp_path}; the same command continues from there." in told
    assert not (tmp_path / "predictions.jsonl").exists()
    assert run(where, tmp_path) == 0
    assert calls == [3, 3, 3, 2]  # the second batch is asked again, the first is not
    assert answers(tmp_path) == answers(whole)


def copied(whole, output) -> Path:
    """The parts of an evaluation in another folder; the path of its answers."""
    shutil.copytree(whole / "parts", output / "parts")
    return output / "parts" / "answers-0.jsonl"


def test_a_line_that_was_cut_off_is_asked_again(where, whole, tmp_path, asked):
    path = copied(whole, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    assert run(where, tmp_path) == 0
    assert sum(asked) == 5
    assert answers(tmp_path) == answers(whole)
    assert len(path.read_bytes().splitlines()) == 8
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_line_that_is_damaged_is_asked_again(where, whole, tmp_path, asked, caplog):
    path = copied(whole, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"prediction"', b'"prophecy"')
    path.write_bytes(b"".join(lines))
    assert run(where, tmp_path) == 0
    assert asked == [1]
    assert answers(tmp_path) == answers(whole)
    assert "answers-0.jsonl:3 is no row of a sample and is left out" in caplog.text


def test_settings_of_a_start_that_answered_nothing_bind_no_one(where, tmp_path, capsys):
    assert run(where, tmp_path, "--allowed-tokens", "cat") == 2
    assert run(where, tmp_path, "--samples", "1") == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--max-new-tokens", "7"), "max_new_tokens: 6 -> 7"),
        (("--dtype", "bfloat16"), "dtype: float32 -> bfloat16"),
        (("--allowed-tokens", "<|im_end|>"), "allowed_tokens: [] -> ["),
    ],
)
def test_other_settings_are_refused(where, whole, capsys, more, told):
    assert run(where, whole, *more) == 2
    error = capsys.readouterr().err
    assert "holds an evaluation of other settings" in error
    assert told in error


def test_other_data_and_another_model_are_refused(where, whole, capsys, tmp_path):
    other = write(where / "other.jsonl", samples()[:3])
    assert run(where, whole, "--data", str(other)) == 2
    assert "data.sha256" in capsys.readouterr().err
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (where / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert run(where, whole, "--model", str(copy), full=True) == 0  # the same model elsewhere
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert run(where, whole, "--model", str(copy)) == 2
    assert "model.weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mended(where, whole):
    """The same samples, whose golds are what the model answers in the first two and the last."""
    rows = samples()
    for at in (0, 1, 7):
        turn = rows[at]["messages"][1]
        turn["content"] = predictions(whole)[at]["prediction"]
        rows[at].pop("regions", None)
    return write(where / "mended.jsonl", rows)


def test_right_answers_are_counted(where, mended, tmp_path, capsys):
    """Three of eight, each metric by Wilson's interval; the failures are the five others."""
    more = ("--data", str(mended), "--failures", "9", "--metrics", "exact_match")
    assert run(where, tmp_path, *more) == 0
    found = result(tmp_path)
    tasks = {task: known["figures"]["exact_match"] for task, known in found["tasks"].items()}
    assert [tasks[task]["value"] for task in tasks] == [0.5, 0.25, 0.375]
    low, high = tasks["all samples"]["low"], tasks["all samples"]["high"]
    assert (low, high) == pytest.approx((0.1368, 0.6943), abs=1e-4)
    assert (tmp_path / "report.html").read_text().count('<div class="sample">') == 5
    assert [row["figures"]["exact_match"][0] for row in predictions(tmp_path)] == [
        *(1, 1, 0, 0),
        *(0, 0, 0, 1),
    ]


def test_a_task_decides_its_metrics_unless_others_are_asked_for(where, whole, tmp_path, asked):
    assert "relaxed_accuracy" not in result(whole)["tasks"]["pointing"]["figures"]
    assert result(whole)["tasks"]["pointing"]["figures"]["coordinates"]["samples"] == 4
    copied(whole, tmp_path)
    assert run(where, tmp_path, "--metrics", "relaxed_accuracy") == 0
    assert asked == []  # answers that are there are scored anew
    for task in ("pointing", "reading"):
        assert list(result(tmp_path)["tasks"][task]["figures"]) == ["relaxed_accuracy"]


def test_a_model_against_itself_differs_by_nothing(where, whole, tmp_path, capsys):
    copied(whole, tmp_path)
    assert run(where, tmp_path, "--compare", str(whole)) == 0
    compared = result(tmp_path)["compared"]
    assert (compared["samples"], compared["only_here"], compared["only_there"]) == (8, 0, 0)
    assert compared["tasks"]["reading"]
    for name, gap in compared["tasks"]["reading"].items():
        assert gap["value"] == 0, name
        assert gap["p_value"] == 1, name
    assert "difference" in capsys.readouterr().out
    assert "<th>difference</th>" in (tmp_path / "report.html").read_text()


def test_figures_measured_by_another_rule_are_never_put_beside(where, whole, tmp_path, capsys):
    """Whether in the same folder, or in one to compare with: there the answers still count."""
    copied(whole, tmp_path / "here")
    settings = tmp_path / "here" / "parts" / "settings.json"
    before = json.loads(settings.read_text())
    assert before["measured"].pop("map_rows") == "predictor"
    settings.write_text(json.dumps(before))
    assert run(where, tmp_path / "here") == 2
    assert "(measured.map_rows: null -> predictor)" in capsys.readouterr().err

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(whole / "predictions.jsonl", other)
    found = result(whole)
    found["settings"]["measured"]["map_rows"] = "last"
    (other / "evaluation.json").write_text(json.dumps(found))
    copied(whole, tmp_path / "again")
    for beside, looks in ((whole, True), (other, False)):
        assert run(where, tmp_path / "again", "--compare", str(beside), full=True) == 0
        names = result(tmp_path / "again")["compared"]["tasks"]["pointing"]
        assert "exact_match" in names
        assert ("attention_ratio" in names, "answer_loss" in names) == (looks, looks)
        assert ("measured by another rule" in capsys.readouterr().out) != looks


def test_samples_that_only_one_has_are_counted(where, whole, tmp_path, capsys):
    fewer = write(where / "fewer.jsonl", [*samples()[2:6], {**samples()[0], "task": "new"}])
    assert run(where, tmp_path, "--data", str(fewer), "--compare", str(whole)) == 0
    compared = result(tmp_path)["compared"]
    assert (compared["samples"], compared["only_here"], compared["only_there"]) == (4, 1, 4)
    assert "on the 4 samples that both have; 1 are only here, 4 only there." in (
        " ".join(capsys.readouterr().out.split())
    )


def test_bad_samples_are_told_and_harm_no_other(where, whole, tmp_path, capsys):
    rows = samples()
    rows[1]["images"] = ["broken.png"]
    rows[6]["messages"][0] = user_with_special()
    rows.append({"messages": [said("Unasked.")]})
    rows.append({"images": ["none.png"], "messages": samples()[0]["messages"]})
    good = (where / "0.png").read_bytes()
    (where / "broken.png").write_bytes(good[: len(good) - 40])
    data = write(where / "bad.jsonl", rows)
    assert run(where, tmp_path, "--data", str(data)) == 0
    found = predictions(tmp_path)
    assert [row["sample"] for row in found] == [0, 2, 3, 4, 5, 7]
    answered = answers(whole)
    assert answers(tmp_path) == [answered[i] for i in (0, 2, 3, 4, 5, 7)]
    bad = {one["where"]: one["reason"] for one in result(tmp_path)["bad"]}
    assert "an image that can be decoded" in bad["bad.jsonl:2"]
    assert "'<|im_end|>'" in bad["bad.jsonl:7"]
    assert "a question before the answer" in bad["bad.jsonl:9"]
    assert "which is not there" in bad["bad.jsonl:10"]
    assert "4 samples could not be used" in " ".join(capsys.readouterr().out.split())
    assert run(where, tmp_path / "s", "--data", str(data), "--on-bad-sample", "stop") == 1


def user_with_special() -> dict:
    return {"role": "user", "content": "It ends <|im_end|> here."}


def test_batches_prepared_in_a_thread_are_the_same(where, whole, tmp_path, monkeypatch):
    def ahead(*given, original=work.answers, **options):
        return original(*given, ahead=True)

    monkeypatch.setattr(work, "answers", ahead)
    assert run(where, tmp_path, "--samples", "2") == 0
    assert answers(tmp_path) == [answers(whole)[i] for i in (0, 1, 4, 5)]
    data = write(where / "unasked.jsonl", [{"messages": [said("Unasked.")]}])
    more = ("--data", str(data), "--on-bad-sample", "stop")
    assert run(where, tmp_path / "stop", *more) == 1  # an error of the thread comes through


def test_a_mended_image_is_asked_again(where, tmp_path, asked):
    data = write(where / "mend.jsonl", [{**samples()[0], "images": ["mend.png"]}, samples()[1]])
    good = (where / "0.png").read_bytes()
    (where / "mend.png").write_bytes(good[: len(good) - 40])
    assert run(where, tmp_path, "--data", str(data)) == 0
    assert len(predictions(tmp_path)) == 1
    (where / "mend.png").write_bytes(good)
    assert run(where, tmp_path, "--data", str(data)) == 0
    assert len(predictions(tmp_path)) == 2
    assert result(tmp_path)["bad"] == []
    assert asked == [1, 1]


def test_a_model_that_cannot_be_attached_is_evaluated_without(
    where, whole, tmp_path, monkeypatch, capsys
):
    from groundkern.trainer.evaluation import grounding

    def refuse(model):
        raise ValueError("`model`: expected attention that is known, got another")

    monkeypatch.setattr(grounding, "attach", refuse)
    copied(whole, tmp_path)
    (tmp_path / "parts" / "figures-0.jsonl").unlink()
    assert run(where, tmp_path, "--failures", "1", full=True) == 0
    assert "expected attention that is known" in result(tmp_path)["grounding_refused"]
    assert "Where it looks is not measured: `model`" in capsys.readouterr().out
    assert "attention_ratio" not in result(tmp_path)["tasks"]["pointing"]["figures"]


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (("--data", "none.jsonl"), 2, "--data: expected a JSON-lines file"),
        (("--model", "./none"), 2, "`model.path`: expected a model folder"),
        (("--adapter", "./none"), 2, "--adapter: expected a folder with adapter_config.json"),
        (("--compare", "./none"), 2, "--compare: expected the output of a finished evaluation"),
        (("--allowed-tokens", "cat"), 2, "--allowed-tokens:"),
        (("--metrics", "wit"), 2, "--metrics: expected"),
        (("--device", "quantum"), 2, "--device:"),
    ],
)
def test_bad_options_are_one_sentence(where, tmp_path, capsys, more, status, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(where, tmp_path, *more) == status
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1


def test_an_output_that_is_no_folder_or_in_use(where, whole, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert run(where, file) == 2
    assert "--output" in capsys.readouterr().err
    assert run(where, whole, "--compare", str(whole)) == 2
    assert "expected another evaluation than --output" in capsys.readouterr().err


def test_intervals_of_a_single_sample_are_not_invented(where, tmp_path):
    data = write(where / "one.jsonl", samples()[:1])
    assert run(where, tmp_path, "--data", str(data), "--failures", "0", full=True) == 0
    ratio = result(tmp_path)["tasks"]["pointing"]["figures"]["attention_ratio"]
    assert ratio["low"] is None and ratio["high"] is None
    assert math.isfinite(ratio["value"])


def test_a_file_of_another_program_is_asked_the_same(where, whole, tmp_path):
    data = tmp_path / "test.json"
    data.write_text(json.dumps(samples()))
    words = ("--data", data, "--root", where, "--samples", "1")
    assert run(where, tmp_path / "out", *words) == 0
    first = predictions(whole)
    assert [row["prediction"] for row in predictions(tmp_path / "out")] == [
        first[0]["prediction"],
        first[4]["prediction"],
    ]
