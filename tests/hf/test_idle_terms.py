"""A term without a row is 0, which looks like a good loss: the trainer says so."""

from __future__ import annotations

import warnings

import pytest

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import GroundingTrainer, Klal, attach, detach
from groundkern.hf.watching.idle_terms import IdleTerms
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import arguments


def _told(lines, last=40) -> list[str]:
    """What is said of log lines, one a step."""
    watch = IdleTerms()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, means in enumerate(lines, 1):
            watch.look(means, step, last)
    return [str(one.message) for one in told]


def test_terms_without_rows_are_told_once():
    idle, moved = {"text": 2.0, "map_kl": 0.0, "word": 0.0}, {"text": 2.0, "map_kl": 1.0}
    assert [said[:46] for said in _told([idle] * 40)] == [
        "`word, map_kl`: 0 in each of the first 16 steps"[:46]
    ]
    assert [said[:10] for said in _told([moved] + [idle] * 39)] == ["`word`: 0 "]
    assert _told([idle] * 15) == [] and len(_told([idle] * 3, last=3)) == 1
    assert _told([{"text": 2.0, "margin_mean": 0.0}] * 20) == []  # margins may all be kept
    assert [said[:26] for said in _told([{}] * 20)] == ["no batch of the first 16 s"]


def test_a_trainer_says_that_batches_supervise_nothing(tmp_path):
    model = attach(tiny_qwen_model(), klal=Klal())
    batch = make_batch(model, SAMPLES["qwen"][:1])
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    without = {name: x for name, x in batch.items() if not name.startswith("gk_map")}
    plain["labels"] = plain["input_ids"]
    for made, said in ((plain, "had gk_ tensors"), (without, "`map_kl`: 0 in each")):
        trainer = GroundingTrainer(
            model,
            arguments(tmp_path, max_steps=1),
            train_dataset=[0],
            data_collator=lambda rows, made=made: made,
        )
        with pytest.warns(UserWarning, match=said):
            trainer.train()
    detach(model)
