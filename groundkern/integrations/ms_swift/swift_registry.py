"""Puts groundkern's trainer into ms-swift's mapping, and lets its templates keep supervision."""

from __future__ import annotations

import sys
from typing import Any

from swift.trainers.trainer_factory import TrainerFactory

from groundkern.integrations.ms_swift.swift_encoding import keep_supervision
from groundkern.integrations.shared.settings import Settings
from groundkern.integrations.shared.training import refuse

TASK = "causal_lm"
TRAINER = "groundkern.integrations.ms_swift.swift_trainer.GroundingSeq2SeqTrainer"
_settings: list[Settings] = []
_own_class = TrainerFactory.get_trainer_cls.__func__


def register(settings: Settings) -> None:
    """Train with these settings.

    Args:
        settings: of the run.
    """
    if "swift.megatron" in sys.modules:
        refuse([("megatron", "`swift sft`", "another trainer")], "ms-swift")
    _settings[:] = [settings]
    keep_supervision()
    TrainerFactory.TRAINER_MAPPING[TASK] = TRAINER
    TrainerFactory.get_trainer_cls = classmethod(_trainer_class)


def registered() -> Settings:
    """The settings of the run.

    Raises:
        ValueError: `register` was not called.
    """
    if not _settings:
        raise ValueError("ms-swift with groundkern: expected `register` in a plugin, got none")
    return _settings[0]


def _trainer_class(factory: type[TrainerFactory], args: Any) -> type:
    """ms-swift's choice, which has to be our trainer: a plugin without effect is a mistake."""
    if hasattr(args, "rlhf_type"):
        refuse([("rlhf_type", "`swift sft`", args.rlhf_type)], "ms-swift")
    if args.task_type != TASK:
        refuse([("task_type", TASK, args.task_type)], "ms-swift")
    return _own_class(factory, args)
