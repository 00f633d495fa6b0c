"""A second model that runs in the same step and teaches: its attention, and its tokens.

It is held by what `attach` leaves in the student's `__dict__`, where no optimizer, checkpoint or
wrapper looks for modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groundkern.checks import fail, require
from groundkern.hf.data.image_token import visual_token_ids
from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.logit_rule import LogitRule, logit_rule
from groundkern.hf.model.map_readings import MapRows
from groundkern.hf.model.policy import (
    AgainstReferences,
    TeacherAttention,
    chosen_layers,
    rows_over_all,
)
from groundkern.hf.model.request import Request
from groundkern.hf.model.support import refuse_unsupported
from groundkern.hf.objectives import Distillation, Objectives


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and which of its layers teaches which of the student's.

    Args:
        model: without wrappers.
        pairs: (student's layer, teacher's layer), by the student's in ascending order.
    """

    model: PreTrainedModel
    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, student: PreTrainedModel, model: PreTrainedModel, how: Distillation) -> Teacher:
        """Check that a model can teach another, and freeze it.

        Args:
            student, model: transformers models without wrappers.
            how: what is taught.

        Raises:
            ValueError: the student itself; other token ids; layers that do not exist.
        """
        require(model is not student, "teacher", "another model than the student", "the student")
        sizes = [x.config.get_text_config().vocab_size for x in (student, model)]
        if how.shared_ids is None:
            wanted = f"the student's vocabulary of {sizes[0]} ids (or distill.shared_ids)"
            require(sizes[0] == sizes[1], "teacher", wanted, f"{sizes[1]} ids")
        else:
            wanted = f"at most {min(sizes)} ids, which both vocabularies have"
            require(how.shared_ids <= min(sizes), "shared_ids", wanted, how.shared_ids)
        own, other = (visual_token_ids(x.config) for x in (student, model))
        require(own == other, "teacher", f"visual tokens of ids {sorted(own)}", sorted(other))
        pairs = layer_pairs(student, model, how) if how.attention else ()
        taught = tuple(sorted({number for _, number in pairs})) or "last"
        refuse_unsupported(model, Objectives(distill=replace(how, layers=taught)))
        model.eval().requires_grad_(False)
        return cls(model, pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Itself: a copy of the student is taught by the same model."""
        return self

    def ready(self, device: torch.device) -> None:
        """Bring a teacher to where batches are, unless it was dispatched to devices of its own.

        Raises:
            ValueError: it is in training mode.
        """
        require(not self.model.training, "teacher", "a model in eval mode", "training mode")
        own = next(self.model.parameters()).device
        if own != device and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)


class Lesson(NamedTuple):
    """What a teacher did with a batch."""

    model: PreTrainedModel
    hidden: Tensor  # [B, Rt, D] of the rows that predict trained tokens, times its logits' scale
    attention: TeacherAttention | None  # by its own layers
    pairs: tuple[tuple[int, int], ...]

    @property
    def logit_rule(self) -> LogitRule:
        """What the teacher's own forward does around its head."""
        return logit_rule(self.model)


def taught_rows(request: Request, how: Distillation) -> MapRows:
    """The rows of the trained tokens, whose attention a teacher's is compared with.

    Args:
        request: of the student or of the teacher.
        how: which rows these are.
    """
    before = request.batch.text_position
    position = before if how.rows == "predictor" else torch.where(before >= 0, before + 1, -1)
    return rows_over_all(request, position, leave_out_self=how.leaves_out_self)


def distilled_reading(request: Request, lesson: Lesson | None) -> AgainstReferences | None:
    """The reading of the `distill` term's attention; None if there is none or no row.

    Args:
        request: of the student.
        lesson: of the same batch.
    """
    if lesson is None or lesson.attention is None:
        return None
    how, taught = request.terms.distill, lesson.attention
    references = {own: taught.found[other] for own, other in lesson.pairs}
    windows = {own: taught.seen[other] for own, other in lesson.pairs}
    return AgainstReferences(taught_rows(request, how), references, how.divergence, windows)


def layer_pairs(
    student: nn.Module, teacher: nn.Module, how: Distillation
) -> tuple[tuple[int, int], ...]:
    """Which layer of a teacher teaches which of a student.

    Counted from 1 among its layers of softmax attention, layer i of n learns from layer
    `ceil(i m / n)` of m, so that the last learns from the last and equal depths pair off one by
    one.

    Args:
        student, teacher: transformers models without wrappers.
        how: which layers; `teacher_layers` takes the place of the rule.

    Raises:
        ValueError: another number of `teacher_layers` than of layers.
    """
    own = chosen_layers(student, how.layers)
    if how.teacher_layers is not None:
        wanted = f"{len(own)} layers, one for each of the student's {own}"
        require(len(how.teacher_layers) == len(own), "teacher_layers", wanted, how.teacher_layers)
        return tuple(zip(own, how.teacher_layers, strict=True))
    mine, theirs = list(text_attention(student)), list(text_attention(teacher))
    if not theirs:
        fail("teacher", "a decoder with layers of softmax attention", type(teacher).__name__)
    place = {number: i + 1 for i, number in enumerate(mine)}
    return tuple((n, theirs[-(-place[n] * len(theirs) // len(mine)) - 1]) for n in own)
