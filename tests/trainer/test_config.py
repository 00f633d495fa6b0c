"""Settings: YAML and command line to a validated Config, and the sentence for each mistake."""

from __future__ import annotations

import inspect
from dataclasses import fields as dataclass_fields
from functools import reduce
from pathlib import Path

import pytest

from groundkern import hf
from groundkern.trainer import config as settings
from groundkern.trainer.command_line import help_text, load_config
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.differences import differences
from groundkern.trainer.fields import field_names
from groundkern.trainer.program import main

REQUIRED = (
    "--model.path=m",
    "--data.train=train.jsonl",
    "--training.output=out",
    "--training.steps=3",
)


def config(*words: str, text: str | None = None, folder: Path | None = None) -> Config:
    path = None
    if text is not None:
        path = folder / "config.yaml"
        path.write_text(text, encoding="utf-8")
    return load_config(path, list(words))


def test_yaml_then_command_line(tmp_path):
    text = """
model: {path: some/model, lora: {r: 4}}
data: {train: a.jsonl, max_length: 512}
objectives:
  smam: {gamma: 0.5}
  klal: {}
training: {output: out, epochs: 2, learning_rate: 1e-3}
evaluation:
"""
    words = ("--model.lora.r", "8", "--objectives.klal.layers", "[0, 2]", "--on-bad-sample=stop")
    got = config(*words, "--objectives.smam", "null", text=text, folder=tmp_path)
    assert got.model.lora.r == 8
    assert got.objectives.smam is None
    assert got.objectives.klal == settings.Klal(layers=(0, 2))
    assert got.objectives.dv_sft is None
    assert got.training.learning_rate == 1e-3
    assert got.data.on_bad_sample == "stop"
    assert got.data.train == Path("a.jsonl")
    assert got.evaluation == settings.Evaluation()


def test_every_field_can_be_overridden_and_is_in_the_help():
    text = help_text()
    sections = [
        name for name in field_names(Config) if name.startswith(("objectives.", "model.lora"))
    ]
    on = [f"--{name}={{}}" for name in sections if name.count(".") == 1]
    required = (*REQUIRED, "--model.teacher=t", "--objectives.distill={}")  # one needs the other
    full = config(*required, *on).model_dump(mode="json")
    for name in field_names(Config):
        assert f"--{name} " in text, name
        default = reduce(dict.get, name.split("."), full)
        if isinstance(default, dict) or name in ("training.steps", "training.epochs"):
            continue
        given = "null" if default is None else str(default)
        word = f"--{name}={given}"
        others = [other for other in required if not other.startswith(f"--{name}=")]
        assert config(*others, word), name


def test_a_field_of_a_section_that_is_off_switches_it_on():
    assert config(*REQUIRED).objectives == settings.Objectives()
    assert config(*REQUIRED, "--objectives.smam.beta=0.2").objectives.smam.beta == 0.2
    assert config(*REQUIRED, "--objectives.smam={}").objectives.smam == settings.Smam()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--training.step=3"], "`training.step`: no such field; did you mean `training.steps`?"),
        (
            ["--klal.weight=3"],
            "`klal.weight`: no such field; did you mean `objectives.klal.weight`",
        ),
        (
            [*REQUIRED, "--objectives.klal.layers=[2, 2]"],
            "`objectives.klal.layers`: expected distinct layer numbers in ascending order, or None",
        ),
        (
            [*REQUIRED, "--objectives.klal={divergence: reverse_kl, over: visible}"],
            "`objectives.klal.over`: expected columns or renormalised with reverse_kl",
        ),
        (["--zzz=3"], "`zzz`: no such field; --help lists all fields"),
        (["--model.path=m"], "`data.train`, `training.output`: required, but not given"),
        ([*REQUIRED, "--training.steps=x"], "`training.steps`: expected a valid integer, got 'x'"),
        ([*REQUIRED, "--training.steps=0"], "`training.steps`: expected greater than 0, got '0'"),
        ([*REQUIRED, "--model.dtype=int3"], "expected 'float32' or 'bfloat16', got 'int3'"),
        ([*REQUIRED, "--training.epochs=1"], "`training`: give one of steps and epochs"),
        ([*REQUIRED, "--model.lora.r"], "`model.lora.r`: expected a value, got none"),
        ([*REQUIRED, "steps"], "expected --section.field, got 'steps'"),
        ([*REQUIRED, "--objectives.klal.layers=[0"], "expected a YAML value, got '[0'"),
    ],
)
def test_mistakes_on_the_command_line(words, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(None, words)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "training: {stepss: 3}",
            "`training.stepss`: no such field; did you mean `training.steps`",
        ),
        ("trainin: {steps: 3}", "`trainin`: no such field; did you mean `training`?"),
        ("[1, 2]", "expected a mapping of sections, got list"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_in_the_file(text, sentence, tmp_path):
    with pytest.raises(ConfigError) as error:
        config(text=text, folder=tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.yaml"))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_is_told_with_its_line_or_as_the_command_line_s(tmp_path):
    text = "model: {path: m}\ndata: {train: t}\ntraining:\n  output: o\n  steps: many\n"
    for words, wanted in (
        ([], f"{tmp_path / 'config.yaml'}:5: "),
        (["--training.steps=x"], "command line: "),
    ):
        with pytest.raises(ConfigError) as error:
            config(*words, text=text, folder=tmp_path)
        assert str(error.value).startswith(f"{wanted}`training.steps`: expected a valid integer")


def test_the_program_ends_with_2_and_one_sentence(tmp_path, capsys):
    missing = tmp_path / "none.yaml"
    for words in (["--config", str(missing)], ["--training.step=3"], []):
        assert main(["train", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


METHODS = ("Smam", "DvSft", "Klal", "Hist", "Margins", "LogitLens", "Distillation")


@pytest.mark.parametrize("name", METHODS)
def test_objectives_have_the_library_s_fields_and_defaults(name):
    made = getattr(settings, name)()
    library = {f.name: f.default for f in dataclass_fields(getattr(hf, name))}
    assert {f.name: getattr(made, f.name) for f in dataclass_fields(made)} == library
    assert isinstance(made, getattr(hf, name))


def test_supervision_has_the_collator_s_options_and_defaults():
    options = inspect.signature(hf.GroundingCollator).parameters
    for key, value in settings.Supervision().model_dump().items():
        assert options[key].default == value, key


def test_differences_name_the_field_and_both_values():
    left = config(*REQUIRED)
    right = config(*REQUIRED, "--training.keep=9", "--objectives.klal.weight=2")
    old, new = (each.model_dump(mode="json") for each in (left, right))
    found = differences(old, new, ignore=("training.keep",))
    assert "objectives.klal.weight: null -> 2.0" in found
    assert not any(sentence.startswith("training") for sentence in found)


def test_a_teacher_and_distillation_come_together(tmp_path):
    distill = "--objectives.distill={layers: all, tokens: 0.5}"
    assert config(*REQUIRED, distill, "--model.teacher=large").objectives.distill.layers == "all"
    for words, wanted in (
        ((distill,), "`objectives.distill`: expected model.teacher beside it"),
        (("--model.teacher=large",), "`model.teacher`: expected objectives.distill beside it"),
        (
            (distill, "--model.teacher=large", "--training.context_parallel=2"),
            "`training.context_parallel`: expected 1 with objectives.distill",
        ),
    ):
        with pytest.raises(ConfigError, match=wanted):
            config(*REQUIRED, *words)
