"""From examples to losses: GroundingCollator batches through an attached model."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import GroundingCollator, Word, attach, doctor
from tests.hf.closeness import assert_same_losses
from tests.hf.collating import (
    EVERYWHERE,
    IMAGE,
    PROCESSORS,
    SMALL,
    make_collator,
    make_example,
    make_region,
)
from tests.hf.naive import naive_forward
from tests.hf.rows import plain_inputs

TARGET = (0.1, 0.2, 0.5, 0.7)


def examples():
    answer = "The red patch is in row 2."
    return [
        make_example(
            answer,
            [make_region(answer, "red patch", boxes=(TARGET,)), make_region(answer, "row")],
            words=(Word("coal", (0.0, 0.0, 0.3, 0.2), 0), Word("man", (0.5, 0.5, 0.7, 0.7), 0)),
        ),
        make_example("Call me Ishmael.", images=()),
        make_example(
            "coal and wife",
            [make_region("coal and wife", "wife", image=1, boxes=(EVERYWHERE,))],
            images=(SMALL, IMAGE),
        ),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collated_batches_give_the_naive_losses(model, family, terms, side):
    collator = GroundingCollator(PROCESSORS[family](padding_side=side), model.config)
    batch = collator(examples())
    assert min(int((batch[f"gk_{k}_position"] >= 0).sum()) for k in ("side", "word", "map")) > 0
    without_labels = {k: v for k, v in batch.items() if k != "labels"}
    naive = naive_forward(model, without_labels, **terms)
    ours = attach(model, **terms)(**batch)
    assert_same_losses(ours, naive)
    assert doctor(model, batch).control > 0.1


def test_text_rows_are_those_of_the_labels(model, family):
    """The text part is the family's own loss on the collator's labels."""
    batch = GroundingCollator(PROCESSORS[family](), model.config)(examples())
    wanted = model(**plain_inputs(batch)).loss
    ours = attach(model)(**batch).parts["text"]
    torch.testing.assert_close(ours, wanted.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pack_to", [None, 1000])
def test_a_multiple_adds_padding_on_the_right_and_nothing_else(pack_to):
    examples = [make_example(), make_example("A much longer answer than that.")]
    plain = make_collator(pack_to=pack_to)(examples)
    collator = make_collator(side="left", pack_to=pack_to, pad_to_multiple_of=64)
    padded, length = collator(examples), plain["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] == 64 * (length // 64 + 1)
    assert collator.counts["tokens_laid"] == padded["input_ids"].numel()
    for name, x in plain.items():
        found = padded[name]
        if found.shape != x.shape:
            assert (found[..., length:] == found[..., -1:]).all()
            found = found[..., :length]
        assert torch.equal(found, x), name
