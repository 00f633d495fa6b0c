"""What runs of other programs share, without the programs: settings, and the watch for rows."""

from __future__ import annotations

import json

import pytest
from transformers import Trainer, TrainingArguments

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import attach, detach
from groundkern.hf.data.batch import COUNTS
from groundkern.integrations.shared.records import grounded_example, supervision_of
from groundkern.integrations.shared.settings import RunSettings, read_settings
from groundkern.integrations.shared.training import KINDS, ProgramMixin
from groundkern.trainer.config import Objectives
from groundkern.trainer.data.images import SampleError
from tests.hf.samples import SAMPLES, make_batch

ON = {"objectives": {"klal": {}, "dv_sft": {}}, "examine": False}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"objectives": {"kal": {}}},
            "`objectives.kal`: no such field; did you mean `objectives.klal`",
        ),
        ({"objectives": {"klal": {"wieght": 1}}}, "did you mean `objectives.klal.weight`"),
        ({"objective": {}}, "`objective`: no such field; did you mean `objectives`"),
        ({"training": {}}, "`training`: no such field; the fields are objectives, "),
        ({"objectives": {"distill": {}}}, "`objectives.distill`: expected null, since no teacher"),
        ({"objectives": {"klal": {"control": "shuffled"}}}, "expected random or complement"),
        (
            {"objectives": {"klal": {"control": "random"}, "margins": {}}},
            "`objectives.klal.control`: expected no objectives.margins beside it",
        ),
        (
            {"objectives": {"dv_sft": {"smoothing": 1.5}}},
            r"expected a number in \[0, 1\)",
        ),
        ({"supervision": {"map_levels": [0, 1, 1]}}, "`supervision.map_levels`: expected a level"),
        ([], r"here: expected sections by name, got \[\]"),
    ],
)
@pytest.mark.parametrize("kind", RunSettings.__subclasses__())
def test_every_programs_settings_are_refused_in_the_same_words(given, said, kind):
    with pytest.raises(ValueError, match=f"^here: .*{said.removeprefix('here: ')}"):
        read_settings(given, "here", kind)


def test_settings_are_a_file_too(tmp_path):
    path = tmp_path / "grounding.json"
    with pytest.raises(ValueError, match=r"grounding.json: expected a YAML or JSON file, got none"):
        read_settings(path, "x")
    path.write_text(json.dumps(ON))
    assert read_settings(path, "x").attached.keys() == {"klal", "dv_sft"}
    assert read_settings(None, "x").attached == {}


def test_every_objective_is_watched_that_may_be_without_rows():
    assert set(KINDS.values()) <= set(COUNTS)
    assert set(Objectives.model_fields) - KINDS.keys() == {"basic", "distill"}  # of every image


def test_a_column_that_is_no_json_is_named():
    with pytest.raises(SampleError, match="a row: `words`: expected a list, or JSON of one"):
        supervision_of({"words": "a text of another kind"})


def test_a_field_that_does_not_fit_is_told_as_in_our_own_files():
    record = {"messages": [{"role": "assistant", "content": "A patch."}], "grounding_weight": -1}
    with pytest.raises(SampleError, match="file:1: `grounding_weight`: expected greater than"):
        grounded_example(record, [], [], "file:1")


class Watched(ProgramMixin, Trainer):
    pass


@pytest.fixture
def train(tmp_path):
    """Trains on batches by number: 0 has all rows, 1 none of words."""
    model = attach(tiny_qwen_model(), **read_settings(ON, "test").attached)
    whole = make_batch(model, SAMPLES["qwen"][:1])
    without = {name: x for name, x in whole.items() if not name.startswith("gk_word")}

    def made(data, *, save=False, resume=None, **options):
        trainer = Watched(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=1,
                learning_rate=1e-4,
                report_to=[],
                logging_steps=1,
                save_strategy="steps" if save else "no",
                save_steps=2,
                use_cpu=True,
                **options,
            ),
            settings=read_settings(ON, "test"),
            train_dataset=data,
            data_collator=lambda rows: dict((whole, without)[rows[0]]),
        )
        trainer._get_train_sampler = lambda *_: None
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer.state

    yield made
    detach(model)


def test_a_run_that_never_had_a_row_ends(train):
    said = "`objectives.dv_sft`: expected samples with words, got none in"
    with pytest.raises(ValueError, match=f"{said} 2 steps"):
        train([1, 1], max_steps=2)
    with pytest.raises(ValueError, match=f"{said} 1 steps; nothing was learned for it"):
        train([1], num_train_epochs=3)
    assert train([1, 0], num_train_epochs=1).global_step == 2


def test_a_run_that_went_on_is_not_ended_by_what_it_has_not_seen_again(train, recwarn):
    train([0, 1, 1], save=True, max_steps=2)
    assert train([0, 1, 1], resume="checkpoint-2", max_steps=3).global_step == 3
    assert not [each for each in recwarn if "in each of the first" in str(each.message)]
