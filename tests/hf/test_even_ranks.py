"""Ranks that take the same steps: what each is given, what is refused on all, and real launches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern.hf import has_images
from groundkern.hf.watching.context_ranks import ContextRanks
from groundkern.hf.watching.even_ranks import EvenRanks, tower_parameters
from tests.hf.launching import accelerate_launch, deepspeed, run
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.uneven import train

FIRST, _, TEXT, _ = SAMPLES["qwen"]


def made(
    model: nn.Module,
    others: Tensor,
    *,
    sharded: bool = True,
    processor: object | None = None,
    collator: object | None = None,
    wrapped: nn.Module | None = None,
    deepspeed: bool = False,
) -> EvenRanks:
    """Of the first of two ranks, whose second tells `others`."""

    def both(own: Tensor) -> Tensor:
        found = others.to(own.dtype)
        if own.dim() == 3:  # of a step: there is a digest too, which is compared in contexts alone
            found = torch.nn.functional.pad(found.reshape(-1, 4), (0, own.shape[-1] - 4))
        return torch.cat((own, found.view_as(own)))

    accelerator = SimpleNamespace(
        gather=both, unwrap_model=lambda model, keep_torch_compile=False: model
    )
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"), gradient_accumulation_steps=2)
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        is_fsdp_enabled=sharded,
        is_deepspeed_enabled=deepspeed,
        model=model,
        model_wrapped=wrapped or model,
        processing_class=processor,
        data_collator=collator,
        context=ContextRanks(),
    )
    ranks = EvenRanks(trainer)
    ranks._gathered = both
    return ranks


def told(*batches: tuple[int, int, int, int]) -> Tensor:
    """Of two micro-batches: is there one, has it rows, images, videos or sounds."""
    return torch.tensor(batches)


@pytest.mark.parametrize("holder", ["processing_class", "collator", "collator of a collator"])
def test_images_are_where_another_rank_has_some(qwen, holder):
    processor = tiny_qwen_processor()
    place = {"processor": processor if holder == "processing_class" else None}
    if holder != "processing_class":
        place["collator"] = SimpleNamespace(processor=processor)
    if holder == "collator of a collator":
        place["collator"] = SimpleNamespace(collator=place["collator"])
    batch = make_batch(qwen, (TEXT,))
    ranks = made(qwen, told((1, 1, 0, 0), (1, 1, 1, 0)), **place)
    first, second = ranks.step([batch, batch])
    assert first is batch
    assert has_images(second)
    assert "pixel_values" not in batch
    trained = made(qwen, told((1, 1, 0, 0), (1, 1, 0, 0)), deepspeed=True, **place)
    assert all(map(has_images, trained.step([batch, batch])))  # else it keeps older gradients
    one = torch.tensor([1, 1, 1, 0])
    assert has_images(made(qwen, one, **place).evaluated(batch))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (told((1, 1, 0, 0), (0, 0, 0, 0)), r"`train_dataset`: expected as many batches .*\[2, 1\]"),
        (told((1, 1, 0, 0), (1, 0, 0, 0)), "`gk_text_position`: expected batches with gk_ tensors"),
        (told((1, 0, 0, 0), (1, 1, 0, 0)), "`gk_text_position`.*a micro-batch with some on some"),
        (told((1, 1, 0, 1), (1, 1, 0, 0)), "`batch`: expected videos and sounds on every rank"),
        (told((1, 1, 1, 0), (1, 1, 0, 0)), "`processing_class`: expected the model's processor"),
    ],
)
def test_what_would_hang_is_refused_on_every_rank(qwen, others, message):
    batch = make_batch(qwen, (TEXT,))
    with pytest.raises(ValueError, match=message):
        made(qwen, others).step([batch, batch])


def test_running_statistics_are_not_moved(qwen):
    qwen.model.visual.norm = nn.BatchNorm1d(4)
    batch = make_batch(qwen, (TEXT,))
    others = told((1, 1, 1, 0), (1, 1, 0, 0))
    ranks = made(qwen, others, processor=tiny_qwen_processor())
    with pytest.raises(
        ValueError, match=r"expected images in every micro-batch.*'model\.visual\.nor"
    ):
        ranks.step([batch, batch])
    other = made(qwen, torch.tensor([1, 1, 1, 0]), processor=tiny_qwen_processor())
    assert has_images(other.evaluated(batch))


def test_loaders_that_end_sooner_are_refused(qwen):
    ranks = made(qwen, torch.tensor([3]))
    assert ranks.as_long([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"`batches`: expected as many on every rank .* \[2, 3\]"):
        ranks.as_long([1, 2])


def test_trained_parameters_of_the_tower(qwen):
    tower = {id(p) for p in qwen.model.visual.parameters()}
    assert {id(p) for p in tower_parameters(qwen)} == tower
    qwen.model.visual.requires_grad_(False)
    assert tower_parameters(qwen) == []


def assert_same_log(found: list[dict], wanted: list[dict]) -> None:
    """Losses and norms of the steps, and the means of the last evaluation."""
    steps = [row for row in wanted if "loss" in row]
    assert len(steps) == 4
    for ours, theirs in zip([row for row in found if "loss" in row], steps, strict=True):
        for name in ("loss", "text", "map_kl", "word", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    ours, theirs = ([row for row in log if "eval_loss" in row][-1] for log in (found, wanted))
    for name in ("eval_loss", "eval_map_kl", "eval_text", "eval_token_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_images_in_other_micro_batches_of_other_ranks(tmp_path, strategy):
    """Checkpointed and trained whole; the second step has no image at all. Under DeepSpeed the
    tower's gradients are 0 then, with which AdamW goes on moving it: SGD without decay does not."""
    optimizer = "sgd" if strategy == "zero3" else "adamw_torch"
    environment = deepspeed() if strategy == "zero3" else {}
    words = ("tests.hf.uneven", str(tmp_path), optimizer)
    run(*words, launcher=accelerate_launch(strategy), **environment)
    found = json.loads((tmp_path / "log.json").read_text())
    assert_same_log(found, train(tmp_path, optimizer))
