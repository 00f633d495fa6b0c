"""Settings of a run that do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from groundkern.hf import objectives as methods


def conflicts(config: BaseModel) -> Iterator[tuple[str, str]]:
    """(field, sentence) of settings that need others.

    Args:
        config: `groundkern.trainer.config.Config`.
    """
    training, evaluation = config.training, config.evaluation
    if config.data.streaming and training.steps is None:
        wanted = "training.steps in its place with data.streaming, whose length is not known"
        yield "training.epochs", f"expected {wanted}, got {training.epochs:g}"
    if training.fp16 and config.model.dtype != "float32":
        yield "training.fp16", f"expected model.dtype float32 beside it, got {config.model.dtype}"
    if evaluation.every is not None and config.data.test is None:
        yield "evaluation.every", "expected data.test beside it, got none"
    if evaluation.best is not None:
        if evaluation.every is None:
            yield "evaluation.best", "expected evaluation.every beside it, got none"
        from groundkern.hf.watching.held_out import held_out_names  # imports torch

        names = held_out_names(methods.Objectives(**dict(config.objectives)))
        if evaluation.best not in names:
            yield "evaluation.best", f"expected one of {', '.join(names)}, got {evaluation.best}"
    yield from objective_conflicts(config.objectives)
    yield from _teacher_conflicts(config)
    if evaluation.patience is not None and evaluation.best is None:
        yield "evaluation.patience", "expected evaluation.best beside it, got none"
    if training.arguments:
        from groundkern.trainer.arguments import conflicts as of_arguments  # imports torch

        yield from of_arguments(config)


def objective_conflicts(objectives: BaseModel) -> Iterator[tuple[str, str]]:
    """The same of objectives alone.

    Args:
        objectives: `groundkern.trainer.config.Objectives`.
    """
    klal = objectives.klal
    if klal is not None and klal.control and objectives.margins is not None:
        wanted = "no objectives.margins beside it, which read the same targets"
        yield "objectives.klal.control", f"expected {wanted}, got {klal.control}"


def _teacher_conflicts(config: BaseModel) -> Iterator[tuple[str, str]]:
    """The same of a teacher, which every process has whole."""
    teacher, distill, training = config.model.teacher, config.objectives.distill, config.training
    if distill is None:
        if teacher is not None:
            yield "model.teacher", f"expected objectives.distill beside it, got {teacher}"
        return
    if teacher is None:
        yield "objectives.distill", "expected model.teacher beside it, got none"
    if training.strategy in ("fsdp2", "zero3"):
        yield "training.strategy", f"expected ddp with objectives.distill, got {training.strategy}"
    if training.context_parallel > 1:
        wanted = "1 with objectives.distill, whose sequences stay whole"
        yield "training.context_parallel", f"expected {wanted}, got {training.context_parallel}"
