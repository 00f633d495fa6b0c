"""What a checker says of the wiring for transformers, as in `ops`."""

from collections.abc import Iterator
from typing import Any, assert_type

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from groundkern.hf import (
    AttentionReward,
    DoctorReport,
    Evidence,
    GroundedExample,
    GroundedOutput,
    GroundingCollator,
    GroundingMixin,
    GroundingTrainer,
    Klal,
    Objectives,
    Region,
    RolloutMixin,
    Smam,
    Word,
    attach,
    detach,
    doctor,
    load_processor,
    objectives_of,
)


class OwnTrainer(GroundingMixin, Trainer):
    """As docs tell people to write one."""


class OwnRollouts(RolloutMixin, Trainer):
    """In front of TRL's GRPOTrainer."""


def train(model: PreTrainedModel, examples: list[GroundedExample]) -> None:
    assert_type(attach(model, smam=Smam(), klal=Klal(weight=0.5)), PreTrainedModel)
    assert_type(objectives_of(model), Objectives)
    assert_type(objectives_of(model).klal, Klal | None)
    processor = load_processor("folder", image_options={"max_pixels": 200_000})
    collator = GroundingCollator(processor, model.config, pack_to=4096)
    batch = collator(examples)
    assert_type(batch, dict[str, Tensor])
    assert_type(doctor(model, batch), DoctorReport)
    args = TrainingArguments("out", remove_unused_columns=False)
    trainer = GroundingTrainer(model, args, data_collator=collator, examine=False)
    OwnTrainer(model=model, args=args, data_collator=collator, max_nonfinite=5)
    assert_type(trainer.evaluate(), dict[str, float])
    assert_type(trainer.get_train_dataloader(), DataLoader[Any])
    assert_type(trainer.args, TrainingArguments)
    assert_type(trainer.get_cp_size(), int)
    with trainer.whole_sequences() as nothing:
        assert_type(nothing, None)
    assert_type(detach(model), PreTrainedModel)
    assert_type(detach(nn.Linear(1, 1)), nn.Linear)


def results(output: GroundedOutput) -> None:
    assert_type(output.loss, Tensor | None)
    assert_type(output.parts, dict[str, Tensor] | None)
    assert_type(output.maps, Tensor | None)


def examples() -> Iterator[GroundedExample]:
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    region = Region(turn=1, image=0, start=0, stop=4, boxes=((0.1, 0.1, 0.4, 0.4),))
    word = Word(text="stop", box=(0.1, 0.1, 0.4, 0.4), image=0)
    yield GroundedExample(messages=messages, images=(), regions=(region,), words=(word,))


def rollouts(processor: Any) -> None:
    reward = AttentionReward(processor, entropy=0.5)
    assert_type(reward([], []), list[float | None])
    OwnRollouts(evidence=Evidence(rows=None), reward_funcs=[reward])


def refused(model: PreTrainedModel, processor: Any) -> None:
    attach(model, Smam())  # type: ignore[call-arg]  # objectives are keyword-only
    attach(model, smam=Klal())  # type: ignore[arg-type]
    attach(model, sman=Smam())  # type: ignore[call-arg]
    Klal(weight="1")  # type: ignore[arg-type]
    Klal(divergence="l2")  # type: ignore[arg-type]
    Smam().weight = 2.0  # type: ignore[misc]  # frozen
    GroundingCollator(processor)  # type: ignore[call-arg]  # without a config
    GroundingCollator(processor, model.config, pack_to="4k")  # type: ignore[arg-type]
    GroundingTrainer(model, max_nonfinite=None)  # type: ignore[arg-type]
    Region(1, 0, 4, image=0, box=(0, 0, 1, 1))  # type: ignore[call-arg]  # boxes
    Evidence(rows=0.5)  # type: ignore[arg-type]
