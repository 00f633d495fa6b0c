"""`examine`: what it says of a model that does everything, and of models that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.families.examining import images
from benchmarks.families.zoo.first import tiny_llava_model, tiny_llava_processor
from groundkern.hf import GroundingCollator, examine
from groundkern.hf.examination import OBJECTIVES, OK, _loss_of, examples_of, text_batch
from groundkern.hf.model.attach import ATTACHMENT


@pytest.fixture
def model():
    return tiny_llava_model()


def test_everything_works_and_nothing_stays(model):
    before = [parameter.clone() for parameter in model.parameters()]
    model.get_decoder().layers[0].train()
    told = []
    found = examine(model, tiny_llava_processor(), images(), gradients=True, tell=told.append)
    assert told == ["collator", "attach", "doctor", *OBJECTIVES, "packing"]
    assert (found.collator, found.attach, found.doctor) == (OK, OK, OK)
    assert found.objectives == dict.fromkeys(OBJECTIVES, OK)
    assert found.trainable and found.packing == OK
    assert [len(table) for table in found.tables] == [16, 16]
    assert found.report.main == 0.0
    assert ATTACHMENT not in model.__dict__
    assert model.get_decoder().layers[0].training and not model.training
    assert all(map(torch.equal, model.parameters(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_gradients_none_is_made(model):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: pytest.fail("a gradient was made"))
    assert examine(model, tiny_llava_processor(), images()).trainable


def test_an_unknown_geometry_leaves_the_doctor_on_text(model):
    model.config.model_type = "no_such_family"
    found = examine(model, tiny_llava_processor(), images())
    assert "'no_such_family'" in found.collator
    assert (found.attach, found.doctor) == (OK, OK)
    assert not found.objectives
    assert not found.trainable


def test_a_geometry_of_the_users_is_used(model):
    processor = tiny_llava_processor()
    place = GroundingCollator(processor, model.config).geometry
    model.config.model_type = "no_such_family"
    seen = []

    def geometry(images, batch):
        seen.append([image.size for sample in images for image in sample])
        model.config.model_type = "llava"
        tables = place(images, batch)
        model.config.model_type = "no_such_family"
        return tables

    assert examine(model, processor, images(), geometry=geometry).trainable
    assert seen[0] == [image.size for image in images()]
    assert len(seen) > 1  # packed rows ask it too


def test_a_model_that_is_refused_says_why(model):
    model.config.is_encoder_decoder = True
    found = examine(model, None, images())
    assert "a decoder without cross-attention" in found.attach
    assert (found.collator, found.doctor, found.objectives) == ("", "", {})


def test_a_gradient_of_zero_is_no_success(model):
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    found = examine(model, tiny_llava_processor(), images(), gradients=True)
    assert "element 0 of tensors does not require grad" in found.objectives["klal"]
    assert found.objectives["dv_sft"] == OK  # by the head


def test_the_samples_have_everything():
    (example,) = examples_of(images()[:1])
    example.check()
    text = example.messages[1]["content"]
    assert [text[p.start : p.stop] for p in example.phrases][2].startswith("The red patch is")


def test_rows_of_other_text_are_found(model, monkeypatch):
    """A tokenizer whose offsets are wrong puts every row a token further."""
    make = GroundingCollator.__call__

    def moved(self, examples):
        batch = make(self, examples)
        rows = batch["gk_side_position"]
        batch["gk_side_position"] = torch.where(rows >= 0, rows + 1, rows)
        return batch

    monkeypatch.setattr(GroundingCollator, "__call__", moved)
    model.config.is_encoder_decoder = True  # nothing but the collator is tried
    found = examine(model, tiny_llava_processor(), images())
    assert "`gk_side_position`: expected the tokens of 'red patch'" in found.collator


def test_running_means_stay(model):
    norm = nn.BatchNorm1d(model.config.get_text_config().hidden_size)
    model.get_decoder().norm.register_forward_hook(lambda _, __, out: norm(out.mT).mT)
    model.get_decoder().norm.after = norm
    _loss_of(model, text_batch(model), "klal")
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
