"""A run that is watched: held-out rows, the best model, patience, trackers, NaN; odd test sets."""

from __future__ import annotations

import gc
import json
from functools import reduce
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from groundkern.hf import GroundingCollator, Klal, attach, detach
from groundkern.hf.model import terms
from groundkern.trainer import checkpoints, durable, watching
from groundkern.trainer import run_folder as folder
from groundkern.trainer.collating import RobustCollator
from groundkern.trainer.config import Config, ConfigError, Evaluation, Objectives, validate
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.fields import field_names
from groundkern.trainer.heatmaps import heat_maps
from groundkern.trainer.loading import open_model
from groundkern.trainer.metrics.held_out import MEASURED, digit_tokens, evaluate
from groundkern.trainer.metrics.tally import sampled
from groundkern.trainer.program import main
from groundkern.trainer.train import train
from groundkern.trainer.watching import Watching, best_step, out_of_patience
from tests.trainer.tiny_run import config, losses, make_data


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()  # each training collects again, which looks at all that pytest has loaded
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first test samples have nothing to show: item 1."""
    where = make_data(tmp_path_factory.mktemp("data"))
    lines = (where / "test.jsonl").read_text().splitlines()
    good = json.loads(lines[0])
    question, answer = good["messages"]
    said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "row 1"}]
    odd = [
        {**good, "regions": []},
        {**good, "images": [], "messages": said, "regions": [], "words": []},
        {**good, "messages": [question, {**answer, "content": ""}], "regions": []},
        {**good, "words": [], "messages": [*said, question, answer], "regions": []},
    ]
    (where / "test.jsonl").write_text("".join(json.dumps(s) + "\n" for s in odd) + "\n".join(lines))
    return where


# ---- item 1: samples without anything to show ----


@pytest.mark.parametrize("objectives", [{}, {"klal": Klal()}], ids=["plain", "klal"])
def test_heat_maps_pass_over_samples_without_a_map(data, objectives):
    model, processor = open_model(str(data / "model"), attn_implementation="sdpa", dtype="float32")
    attach(model, **objectives)
    tests = JsonLinesDataset(data / "test.jsonl")
    every = {"pointing": list(range(len(tests)))}
    given = MEASURED
    collator = RobustCollator(GroundingCollator(processor, model.config, **given), "skip")
    digits = digit_tokens(processor.tokenizer, model.config.get_text_config().vocab_size)
    for size in (1, 8) if objectives else (8,):  # alone and beside samples that have maps
        figures = evaluate(model, collator, every, tests, digits=digits, batch_size=size)
        assert figures["pointing"]["samples"] == 8
        assert figures["pointing"]["attention_ratio"] > 0
        counts = sampled(figures["pointing"], "attention_ratio").counts  # whatever the batches
        assert counts.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    entries = heat_maps(model, collator, every, tests, limit=2)
    assert [entry["name"] for entry in entries] == ["test.jsonl:5", "test.jsonl:6"]
    assert len(entries[0]["attention"]) == 9
    assert heat_maps(model, collator, {"": [0, 1, 2, 3]}, tests, limit=2) == []

    cut = GroundingCollator(processor, model.config, max_length=24, **given)  # the answers are cut
    cut = RobustCollator(cut, "skip")
    assert heat_maps(model, cut, every, tests, limit=2) == []
    figures = evaluate(model, cut, {"": [4]}, tests, digits=digits, batch_size=1)[""]
    assert figures.pop("per_sample")["sums"].keys() == {"word_accuracy", "word_baseline"}
    assert figures.keys() == {"samples", "word_accuracy", "word_baseline"}
    detach(model)


# ---- the whole of watching, through a crash ----

LORA = {"lora": {"r": 2, "dropout": 0.5}, "freeze_vision": True}
LEARNED = {"smam": None, "dv_sft": None, "klal": {"head_weight": "learned", "weight": 5.0}}


class Tracker(TrainerCallback):
    """Stands for TensorBoard's."""

    rows: ClassVar[list[dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


class Killed(Exception):
    pass


@pytest.fixture
def figures(monkeypatch) -> dict:
    """What `eval_text` is at each step, and at which step the run dies ("dies")."""
    given, real, step_end = {}, Watching.on_evaluate, Watching.on_step_end

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_text"] = given[state.global_step]
        state.log_history[-1]["eval_text"] = given[state.global_step]
        return real(self, args, state, control, metrics=metrics, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == given.get("dies"):
            raise Killed
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watching, "on_evaluate", on_evaluate)
    monkeypatch.setattr(Watching, "on_step_end", on_step_end)
    return given


NOTHING = {"tasks": {}, "heat_maps": []}  # known of the start: not measured again


def watched(data: Path, output: Path, **changed: dict) -> Config:
    settings = {
        "training": {
            "save_every": 4,
            "log_every": 5,
            "keep": 1,
            "term_norms_every": 5,
            "batch_size": 1,
        },
        "evaluation": {"every": 2, "best": "text", "heatmaps": 0, "samples": 5, "batch_size": 5},
        "model": LORA,
        "objectives": LEARNED,
    }
    merged = {name: {**fields, **changed.get(name, {})} for name, fields in settings.items()}
    return config(data, output, **merged)


def test_watched_run_through_a_crash_is_the_run_without_one(data, tmp_path, figures, monkeypatch):
    """LoRA with learned head weights; a log window and the best checkpoint lie across it."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    Tracker.rows.clear()
    figures.update({2: 1.0, 4: 3.0, 6: 2.0})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(watched(data, whole, training={"report_to": ["tensorboard"]}), before=NOTHING)
    assert any("eval_map_kl" in row for row in Tracker.rows)
    assert any("map_kl" in row for row in Tracker.rows)

    figures["dies"] = 5
    with pytest.raises(Killed):
        train(watched(data, broken), before=NOTHING)
    assert [path.name for path in checkpoints.listed(broken)] == ["checkpoint-2", "checkpoint-4"]
    del figures["dies"]
    train(watched(data, broken))

    assert losses(broken) == losses(whole)
    steps = [[row.get("steps") for row in folder.read_metrics(o)] for o in (broken, whole)]
    assert steps[0] == steps[1]
    rows = losses(whole)
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 6]
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [2, 4, 6]
    assert {"eval_map_kl", "eval_word", "eval_token_accuracy"} <= held_out[0].keys()
    assert {"grad_norm_text", "grad_norm_map_kl"} <= rows[2].keys()
    weights = []
    for output in (whole, broken):
        assert [path.name for path in checkpoints.listed(output)] == [
            "checkpoint-2",
            "checkpoint-6",
        ]
        record = durable.read_json(output / folder.RECORD)
        best = record["best"]
        assert (best["step"], best["metric"], best["value"]) == (2, "text", 1.0)
        assert record["final_losses"]["loss"] == rows[-2]["loss"]
        assert record["supervision"]["samples"] == 11  # 9 and 2; none of those held out
        for name in ("adapter_model.safetensors", "groundkern_trained.safetensors"):
            model = load_file(output / folder.MODEL / name)
            saved = load_file(output / "checkpoint-2" / name)
            last = load_file(output / "checkpoint-6" / name)
            assert all(torch.equal(model[key], saved[key]) for key in saved | model)
            assert not all(torch.equal(model[key], last[key]) for key in last)
        weights.append(model["groundkern_head_weight"])
    assert torch.equal(*weights)
    assert weights[0].abs().max() > 0
    report = (whole / folder.REPORT).read_text(encoding="utf-8")
    assert "dashed: held out" in report
    assert "The model is that of step 2" in report
    assert "gradient norm, KLAL: map KL" in report


def test_patience_ends_the_run_for_good(data, tmp_path, figures):
    figures.update({1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0})
    settings = watched(data, tmp_path, evaluation={"every": 1, "patience": 2})
    train(settings, before=NOTHING)
    rows = losses(tmp_path)
    assert max(row["step"] for row in rows) == 4
    assert [row["eval_text"] for row in rows if "eval_text" in row] == [3.0, 1.0, None, 2.0]
    assert durable.read_json(tmp_path / folder.RECORD)["best"]["step"] == 2
    train(settings)
    assert losses(tmp_path) == rows


def test_a_damaged_best_checkpoint_gives_way_to_the_next(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state_of({1: 1.0, 2: 2.0, 3: 3.0}).save_to_json(
        str(tmp_path / "checkpoint-3/trainer_state.json")
    )
    damaged = {"checkpoint-1": "optimizer.pt was changed"}
    monkeypatch.setattr(checkpoints, "fault", lambda path: damaged.get(path.name))
    found = watching.best_of(tmp_path, Evaluation(best="loss", every=1))
    assert found["step"] == 2
    assert found["value"] == 2.0
    assert watching.best_of(tmp_path, Evaluation()) is None


def state_of(figures: dict[int, float | None], name: str = "eval_loss") -> TrainerState:
    rows = [{"step": step, name: value} for step, value in figures.items()]
    return TrainerState(log_history=[{"step": 1, "loss": 0.0}, *rows])


def test_the_best_step_follows_from_the_log():
    loss, accuracy = Evaluation(best="loss", every=1), Evaluation(best="token_accuracy", every=1)
    found = state_of({1: 3.0, 2: 1.0, 3: None, 4: 1.0, 5: 0.5})
    assert best_step(found, loss) == 5
    assert best_step(found, loss, among=[1, 2, 3, 4]) == 2  # the first of equals
    assert best_step(found, loss, among=[3]) is None
    assert best_step(found, Evaluation()) is None
    assert best_step(state_of({1: 0.2, 2: 0.9, 3: 0.1}, "eval_token_accuracy"), accuracy) == 2
    for patience, over in ((2, True), (3, True), (4, False)):
        settings = Evaluation(best="loss", every=1, patience=patience)
        assert out_of_patience(state_of({1: 1.0, 2: 2.0, 3: None, 4: 1.0}), settings) == over


# ---- item 7: NaN ----


def test_nan_ends_with_1_and_leaves_a_good_checkpoint(data, tmp_path, capsys, monkeypatch):
    klal, calls = terms.TERMS["klal"], [0]

    def ruined(request, body, scores):
        weighted, parts = klal(request, body, scores)
        calls[0] += request.model.training
        factor = float("nan") if calls[0] > 6 else 1.0  # from step 4: two micro-batches a step
        return weighted * factor, {"map_kl": parts["map_kl"] * factor}

    monkeypatch.setitem(terms.TERMS, "klal", ruined)
    training = {"save_every": 1, "keep": 1, "steps": 20, "max_nonfinite": 2}
    settings = tmp_path / "config.json"
    run = tmp_path / "run"
    wanted = config(data, run, training=training, data={"test": None})
    settings.write_text(wanted.model_dump_json())
    assert main(["train", "--config", str(settings)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: `loss`: expected finite values, got NaN or infinity in `map_kl`"
    )
    assert " at steps 4 to 5; " in error
    proved, kept = checkpoints.listed(run)  # step 4 says what step 3 made of the weights
    assert (proved.name, kept.name) == ("checkpoint-2", "checkpoint-3")
    assert checkpoints.fault(proved) is None
    assert checkpoints.fault(kept) is None
    assert not (run / folder.REPORT).exists()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    for path in (run / folder.METRICS, kept / "trainer_state.json", kept / folder.RECORD):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line, parse_constant=refuse)
    rows = folder.read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3]["loss"] is None
    assert rows[3]["nonfinite_steps"] == 1


# ---- settings ----


def numeric_fields() -> list[str]:
    """Every field of the settings that takes a number, or several."""
    names = []
    on = {name: {} for name in Objectives.model_fields}
    full = whole(model={"lora": {}, "teacher": "t"}, objectives=on)
    for name in field_names(Config):
        kind = type(reduce(getattr, name.split("."), full))
        text = str(annotation(name))
        if "int" in text or "float" in text or kind in (int, float):
            names.append(name)
    return names


def annotation(name: str) -> object:
    inner: object = Config
    for part in name.split("."):
        for kind in (inner, *getattr(inner, "__args__", ())):
            fields = getattr(kind, "__pydantic_fields__", {})
            if part in fields:
                inner = fields[part].annotation
                break
    return inner


def whole(**sections: dict) -> Config:
    values = {
        "model": {"path": "m"},
        "data": {"train": "t", "test": "t"},
        "training": {"output": "o", "steps": 3},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return validate(values, where=lambda loc: "test")


def changed(name: str, value: object) -> Config:
    section, *path = name.split(".")
    fields = reduce(lambda inner, key: {key: inner}, reversed(path), value)
    if path[0] == "distill":
        return whole(**{section: fields}, model={"teacher": "t"})
    if name == "training.epochs":
        fields["steps"] = None
    return whole(**{section: fields})


ABSURD = [float("inf"), float("-inf"), float("nan"), -1, -0.5, 1e23, 10**23, 1e300]


@pytest.mark.parametrize("name", numeric_fields())
def test_numbers_that_cannot_be_meant_are_refused_by_name(name):
    """Walks all fields, so that a new one cannot be forgotten."""
    shape = annotation(name)
    places = {"supervision.map_levels": 3}.get(name, 1 if "tuple" in str(shape) else 0)
    for absurd in ABSURD:
        for place in range(max(1, places)):
            value = [1.0] * places
            if places:
                value[place] = absurd
            with pytest.raises(ConfigError) as error:
                changed(name, value if places else absurd)
            sentence = str(error.value)
            assert sentence.startswith(f"test: `{name}"), (absurd, sentence)
            assert "\n" not in sentence


def test_the_walk_meets_the_fields_that_were_found():
    walked = numeric_fields()
    for name in ("training.learning_rate", "training.seed", "training.steps"):
        assert name in walked
    assert {"supervision.map_levels", "objectives.klal.layers", "model.lora.r"} <= set(walked)
    assert len(walked) > 40


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"supervision": {"map_levels": [0, 0, 0]}}, "`supervision.map_levels`: expected a level"),
        ({"supervision": {"map_levels": [1, 2, 0]}}, "`supervision.map_levels`: expected a level"),
        ({"training": {"seed": 2**32}}, "`training.seed`: expected less than 4294967296"),
        ({"training": {"learning_rate": 0}}, "`training.learning_rate`: expected greater than"),
        ({"training": {"bf16": True, "fp16": True}}, "`training`: give one of bf16 and fp16"),
        (
            {"training": {"fp16": True}, "model": {"dtype": "bfloat16"}},
            "`training.fp16`: expected model.dtype float32 beside it, got bfloat16",
        ),
        ({"evaluation": {"best": "loss"}}, "`evaluation.best`: expected evaluation.every beside"),
        (
            {"evaluation": {"best": "bleu", "every": 1}},
            "`evaluation.best`: expected one of loss, text, word, smam_grounding, smam_cross_entro"
            "py, map_kl, token_accuracy, word_accuracy, got bleu",
        ),
        (
            {"evaluation": {"patience": 1}},
            "`evaluation.patience`: expected evaluation.best beside it, got none",
        ),
        (
            {"data": {"test": None}, "evaluation": {"every": 1}},
            "`evaluation.every`: expected data.test beside it, got none",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, sentence):
    with pytest.raises(ConfigError) as error:
        whole(**changed)
    assert sentence in str(error.value)


def test_trackers_and_fp16_are_refused_before_any_work(monkeypatch):
    class Missing(TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("TensorBoardCallback requires\ntensorboard to be installed.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Missing)
    with pytest.raises(ConfigError, match=r"tensorboard cannot be used: .* requires tensorboard"):
        watching.refuse_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"`training\.report_to`: expected some of .*, got paper"):
        watching.refuse_trackers(["paper"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`training\.fp16`: expected a GPU, got none"):
        watching.refuse_fp16(whole(training={"fp16": True}))
