"""Whether there is anything to learn (issue 17, item 6): said at the start and while training."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter

import pytest
from transformers import AutoModelForImageTextToText, TrainerControl, TrainerState

from groundkern.hf import GroundingCollator, load_processor
from groundkern.trainer import supervised
from groundkern.trainer.collating import RobustCollator
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.program import main
from groundkern.trainer.supervised import NEEDS, SupervisionWatch, check_supervision
from tests.trainer.tiny_run import config

OFF = {"smam": None, "dv_sft": None, "klal": None}


@pytest.fixture(scope="module")
def parts(data):
    return load_processor(data / "model"), AutoModelForImageTextToText.from_pretrained(
        data / "model"
    ).config


@pytest.fixture
def check(data, parts, tmp_path):
    """Checks a run on changed samples, made of the nine of `make_data`."""

    def check(change=lambda sample, i: sample, looks=32, max_length=None, **objectives):
        lines = (data / "train.jsonl").read_text().split("\n")[:9]
        samples = [change(json.loads(line), i) for i, line in enumerate(lines)]
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(map(json.dumps, samples)))
        options = {"train": str(path), "root": str(data), "max_length": max_length}
        settings = config(data, tmp_path, data=options, objectives={**OFF, **objectives})
        dataset = JsonLinesDataset(path, root=data)
        lens = settings.objectives.logit_lens is not None
        options = {"lens": lens, "contrast": settings.objectives.patch_text is not None}
        collator = GroundingCollator(*parts, max_length=max_length, **options)
        check_supervision(settings, dataset, RobustCollator(collator, "skip", dataset), looks=looks)

    return check


def without(*fields: str, but: int | None = None):
    def change(sample: dict, i: int) -> dict:
        return {k: v for k, v in sample.items() if i == but or k not in fields}

    return change


def answering(answer: str, but: int | None = None):
    def change(sample: dict, i: int) -> dict:
        if i == but:
            return sample
        messages = [sample["messages"][0], {"role": "assistant", "content": answer}]
        return {"images": sample["images"], "messages": messages}

    return change


def text_alone(sample: dict, i: int) -> dict:
    return {"messages": [{"role": "user", "content": "Where?"}, sample["messages"][-1]]}


def test_needs_name_every_objective():
    from groundkern.trainer.config import Objectives

    assert set(NEEDS) | {"distill"} == set(Objectives.model_fields)  # which is of answers alone


def test_6_a_good_file_says_nothing(check, caplog):
    with caplog.at_level(logging.WARNING):
        check(smam={}, dv_sft={}, klal={}, margins={}, logit_lens={})
    assert caplog.text == ""


@pytest.mark.parametrize("name", NEEDS)
def test_6_an_objective_that_no_sample_serves_is_refused(check, name):
    field = NEEDS[name][0]
    sentence = f"^`objectives.{name}`: expected samples with {field} in d.jsonl, got none among 9; "
    change = text_alone if field == "images" else without(field)
    with pytest.raises(ConfigError, match=sentence):
        check(change, **{name: {}})
    check(change)  # fine for a plain run


def test_6_a_few_samples_that_serve_an_objective_are_told_with_counts(check, caplog):
    check(without("regions", but=3), smam={}, klal={}, dv_sft={})
    sentence = "d.jsonl: 1 of 9 samples have regions: the others teach nothing to smam, klal"
    assert [record.message for record in caplog.records] == [sentence]


def test_6_words_that_are_all_dropped_are_refused_where_that_is_certain(check, caplog):
    def long(sample, i):
        return {**sample, "words": [{"text": "row column " * 5, "box": [0, 0, 84, 27]}]}

    unusable = r"`objectives.dv_sft`: expected words that can be used, got none of "
    with pytest.raises(ConfigError, match=rf"^{unusable}all 9 samples \(words_dropped_long 9\)$"):
        check(long, dv_sft={}, max_length=None)
    check(long, dv_sft={}, looks=4)
    assert caplog.records[-1].message.startswith(unusable + "4 of 9 samples (words_dropped_")


def test_6_regions_with_one_word_alone_are_told_as_such(check):
    lost = r"\(contrast_words_alone 9\)$"
    with pytest.raises(ConfigError, match=rf"^`objectives.patch_text`: expected .* {lost}"):
        check(patch_text={})


def test_6_empty_answers(check, caplog):
    sentence = "^d.jsonl: expected answers to train on, got 9 that are all empty$"
    for empty in ("", " \n"):
        with pytest.raises(SampleError, match=sentence):
            check(answering(empty))
    check(answering("", but=0))
    assert "d.jsonl: 8 of 9 answers are empty: only their end of turn is trained" in caplog.text


def test_6_a_max_length_that_cuts_every_answer(check, caplog):
    cut = "`data.max_length`: expected room for answers, got 20: it cuts those of "
    with pytest.raises(ConfigError, match=f"^{cut}all 9 samples$"):
        check(max_length=20)
    check(max_length=20, looks=3)
    assert [record.message for record in caplog.records] == [f"{cut}3 of 9 samples"]


def test_6_samples_that_the_model_does_not_take(check, caplog, data, tmp_path):
    said = r"d.jsonl: expected samples that the model takes, got none of {} that were tried; the "
    said += r"first: d.jsonl:1: `max_length`: expected at least \d+ tokens, for its images, got 3$"
    with pytest.raises(SampleError, match=said.format(9)):
        check(max_length=3)
    check(max_length=3, looks=2)
    assert [bool(re.match(said.format(2), each.message)) for each in caplog.records] == [True]
    with pytest.raises(SampleError, match="got none: each was skipped"):  # none in a whole run
        watched(data, tmp_path, {"samples": 0}, step=6)


def test_6_answers_that_are_cut_in_part_are_told(check, caplog, monkeypatch):
    call = GroundingCollator.__call__

    def counting(self, examples):
        batch = call(self, examples)
        self.counts.update(answers_truncated=self.counts["samples"] == 1)
        return batch

    monkeypatch.setattr(GroundingCollator, "__call__", counting)
    check(max_length=500)
    found = [record.message for record in caplog.records]
    assert found == ["`data.max_length`: 500 leaves nothing of 1 of 9 answers of all 9 samples"]


def test_6_the_look_is_bounded_in_time_and_says_nothing_it_has_not_seen(check, caplog, monkeypatch):
    monkeypatch.setattr(supervised, "SECONDS", -1.0)
    check(max_length=20, smam={})
    assert caplog.text == ""


def test_6_the_program_ends_with_a_sentence(data, tmp_path, capsys):
    for changed, status, sentence in (
        ({"objectives": {**OFF, "hist": {}}}, 2, "error: `objectives.hist`: expected samples with"),
        ({"data": {"max_length": 20}}, 2, "error: `data.max_length`: expected room for answers"),
    ):
        (tmp_path / "c.json").write_text(config(data, tmp_path / "o", **changed).model_dump_json())
        assert main(["train", "--config", str(tmp_path / "c.json")]) == status
        assert capsys.readouterr().err.splitlines()[-1].startswith(sentence)


def watched(data, tmp_path, counts: dict, step: int = 1, **objectives) -> None:
    settings = config(data, tmp_path, objectives={**OFF, **objectives}, data={"max_length": 20})
    watch = SupervisionWatch(settings, JsonLinesDataset(data / "train.jsonl"), Counter(counts))
    state = TrainerState(global_step=step, max_steps=6)
    watch.on_step_end(None, state, TrainerControl())


def test_6_a_run_without_one_trained_token_stops(data, tmp_path, monkeypatch):
    cut = "^`data.max_length`: expected room for answers, got 20: it cuts those of {} samples"
    watched(data, tmp_path, {"samples": 8, "samples_truncated": 8})
    with pytest.raises(SampleError, match=cut.format(9)):  # a whole pass
        watched(data, tmp_path, {"samples": 9, "samples_truncated": 9})
    with pytest.raises(SampleError, match=cut.format(2)):  # the last step
        watched(data, tmp_path, {"samples": 2, "samples_truncated": 2}, step=6)
    with pytest.raises(SampleError, match=r"^`data.train`: expected answers with tokens to train"):
        watched(data, tmp_path, {"samples": 9})
    monkeypatch.setattr(supervised, "PATIENCE", 5)
    with pytest.raises(SampleError, match=cut.format(5)):  # of a file that is longer than that
        watched(data, tmp_path, {"samples": 5, "samples_truncated": 5})


@pytest.mark.parametrize("name", NEEDS)
def test_6_a_pass_without_a_row_for_an_objective_stops(data, tmp_path, name):
    field, rows = NEEDS[name]
    good = {"samples": 9, "text_rows": 40, rows: 1}
    watched(data, tmp_path, good, **{name: {}})
    watched(data, tmp_path, {**good, "samples": 8, rows: 0}, **{name: {}})
    unusable = f"^`objectives.{name}`: expected {field} that can be used, got none of 9 samples"
    with pytest.raises(SampleError, match=unusable):
        watched(data, tmp_path, {**good, rows: 0}, **{name: {}})
