"""Put grounding supervision on a transformers model, and remove it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundkern.backends import NAMES
from groundkern.checks import fail, require
from groundkern.hf.model.attention import CHUNK, LAYER, RUN, grounded
from groundkern.hf.model.body import APART
from groundkern.hf.model.compiled import compile_layers, is_compiled
from groundkern.hf.model.context import CONTEXT
from groundkern.hf.model.engines.ulysses import ulysses_of
from groundkern.hf.model.forward import grounded_forward
from groundkern.hf.model.head_weight import set_head_weight
from groundkern.hf.model.layers import text_layers
from groundkern.hf.model.logit_rule import LogitRule, measured_rule, refuse_other_losses
from groundkern.hf.model.mixers import unwrap_mixers, wrap_mixers
from groundkern.hf.model.own_forward import ATTACHMENT
from groundkern.hf.model.support import FAILED, base_model, refuse_unsupported, warn_of_windows
from groundkern.hf.model.teacher import Teacher
from groundkern.hf.objectives import (
    AttentionPolicy,
    Basic,
    Distillation,
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    Objectives,
    PatchText,
    Smam,
)
from groundkern.hf.output import GroundedOutput


@dataclass(frozen=True)
class Attachment:
    """What `attach` left on a model."""

    objectives: Objectives
    replaced: Callable[..., Any] | None  # the forward that was set on the instance before, if any
    rule: LogitRule
    teacher: Teacher | None = None


@dataclass
class WrappedFunction:
    """An attention function that is wrapped in place, and the attached models that call it."""

    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    users: WeakSet[nn.Module]


Model = TypeVar("Model", bound=nn.Module)
Key = tuple[str, str]  # where an attention function is looked up, and under which name
REGISTRY = "registry"  # transformers'; the place of an eager function is its modeling file

_wrapped: dict[Key, WrappedFunction] = {}


def attach(
    model: Model,
    *,
    smam: Smam | None = None,
    dv_sft: DvSft | None = None,
    klal: Klal | None = None,
    hist: Hist | None = None,
    margins: Margins | None = None,
    logit_lens: LogitLens | None = None,
    basic: Basic | None = None,
    patch_text: PatchText | None = None,
    policy: AttentionPolicy | None = None,
    distill: Distillation | None = None,
    teacher: nn.Module | None = None,
    backend: str = "auto",
) -> Model:
    """Let `model(**batch)` compute grounding losses when the batch carries `gk_` tensors.

    Without them the model behaves as before: generation, saving and ordinary training are
    untouched. Works before or after PEFT and `torch.compile`, which compiles the decoder's layers
    (`compile_layers`); attach before wrapping for DDP or FSDP.
    Attaching again replaces the objectives.

    Args:
        model: a transformers model, bare or inside PEFT.
        smam, dv_sft, klal, hist, margins, logit_lens, basic, patch_text, policy, distill: the
            objectives to train beside the text loss; None: not trained.
        teacher: of `distill`: another transformers model of the same tokens. It is frozen, set to
            eval mode and attached, moves to the batches' device, and is no part of `model`, its
            parameters or its checkpoints.
        backend: of every op: "auto", "reference", "native" or "triton".

    Returns:
        The same `model`. With `gk_` inputs its forward returns a `GroundedOutput`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown backend; an objective that the wiring does not support on this
            architecture, by name (`supported_objectives`).
    """
    base, backends = base_model(model), ("auto", *NAMES)
    require(backend in backends, "backend", " | ".join(backends), backend)
    given = smam, dv_sft, klal, hist, margins, logit_lens, basic, patch_text
    objectives = Objectives(*given, policy=policy, distill=distill, backend=backend)
    refuse_unsupported(base, objectives)
    taught = _teacher_of(base, distill, teacher)
    rule = measured_rule(base)
    refuse_other_losses(base)
    warn_of_windows(base, objectives)
    previous = base.__dict__.get(ATTACHMENT)
    try:
        for layer in text_layers(base):
            if layer.attention is not None:
                layer.attention.__dict__.update({LAYER: layer.number, CHUNK: layer.chunk})
                _wrap(_function_of(layer.attention), base)
        wrap_mixers(base)
    except Exception:
        if previous is None:
            _unmark(base)
        raise
    replaced = previous.replaced if previous else base.__dict__.get("forward")
    base.__dict__[ATTACHMENT] = Attachment(objectives, replaced, rule, taught)
    base.__dict__.pop(APART, None)  # perhaps another attention function, with other masks
    set_head_weight(base, klal)
    if previous is None:
        forward = _patched_forward(type(base))  # type: ignore[arg-type]  # a class is hashable
        base.forward = MethodType(forward, base)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`; a model that is not attached is left alone.

    The attention function is restored when the last attached model that uses it is detached.

    Args:
        model: a transformers model, bare or inside PEFT.

    Returns:
        The same `model`.

    Raises:
        TypeError: not a transformers model.
    """
    base = base_model(model)
    attachment = base.__dict__.pop(ATTACHMENT, None)
    if attachment is None:
        return model
    set_head_weight(base, None)
    forward = base.__dict__.get("forward")
    patched = _patched_forward(type(base))  # type: ignore[arg-type]
    if getattr(forward, "__func__", None) is patched:
        del base.forward  # a forward that someone wrapped around ours stays, and passes through
        if attachment.replaced is not None:
            base.forward = attachment.replaced
    _unmark(base)
    return model


def _unmark(model: PreTrainedModel) -> None:
    """Undo what `attach` does to the modules of a model and to its attention functions."""
    for module in model.modules():
        for mark in (LAYER, CHUNK):
            module.__dict__.pop(mark, None)
    unwrap_mixers(model)
    for mark in (FAILED, APART, CONTEXT):
        model.__dict__.pop(mark, None)
    for key in [key for key, function in _wrapped.items() if model in function.users]:
        _unwrap(key, model)


def _teacher_of(
    student: PreTrainedModel, distill: Distillation | None, teacher: nn.Module | None
) -> Teacher | None:
    """The teacher, attached without objectives if it is not attached."""
    if distill is None and teacher is None:
        return None
    if distill is None or teacher is None:
        missing, given = ("distill", "teacher") if distill is None else ("teacher", "distill")
        fail(missing, f"one beside `{given}`", None)
    other = base_model(teacher)
    found = Teacher.of(student, other, distill)
    if ATTACHMENT not in other.__dict__:
        attach(other)
    return found


def objectives_of(model: nn.Module) -> Objectives:
    """The objectives attached to a model.

    Args:
        model: a transformers model, bare or inside PEFT.

    Returns:
        What `attach` was given.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model that is not attached.
    """
    attachment = base_model(model).__dict__.get(ATTACHMENT)
    if attachment is None:
        fail("model", "a model that groundkern.hf.attach was called on", "one without")
    return attachment.objectives


@cache
def _patched_forward(model_class: type[PreTrainedModel]) -> Callable[..., Any]:
    """One forward per class with the class's signature, which generation and trainers inspect."""

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        attachment = self.__dict__.get(ATTACHMENT)
        grounding = any(name.startswith("gk_") for name in kwargs) and RUN not in kwargs
        if attachment is not None and grounding:
            compiling = torch.compiler.is_compiling()
            return _grounded_forward(self, attachment, args, kwargs, compiling)
        replaced = attachment.replaced if attachment is not None else None
        if replaced is not None:
            return replaced(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    vars(forward)["__signature__"] = inspect.signature(model_class.forward)
    return forward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grounded_forward(
    model: PreTrainedModel,
    attachment: Attachment,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compiling: bool,
) -> GroundedOutput:
    """`grounded_forward`, eagerly; a compiled model's layers are compiled instead."""
    if compiling and not is_compiled(model):
        compile_layers(model)
    _wrap_ulysses(model)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    return grounded_forward(model, attachment.objectives, inputs, attachment.teacher)


def _function_of(module: nn.Module) -> Key:
    """Where a module's attention function is looked up."""
    name: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    if name != "eager":
        return REGISTRY, name
    return type(module).__module__, "eager_attention_forward"


def _functions(place: str) -> MutableMapping[str, Callable[..., Any]]:
    """The attention functions of a place, by name."""
    return ALL_ATTENTION_FUNCTIONS if place == REGISTRY else vars(sys.modules[place])


def _wrap(key: Key, model: PreTrainedModel) -> None:
    (place, name), function = key, _wrapped.get(key)
    functions = _functions(place)
    original = functions[name]
    if function is None or original is not function.wrapper:  # new, or replaced by someone since
        users = function.users if function else WeakSet()
        function = _wrapped[key] = WrappedFunction(original, grounded(original, name), users)
        functions[name] = function.wrapper
    function.users.add(model)


def _wrap_ulysses(model: PreTrainedModel) -> None:
    """Wrap attention functions again that DeepSpeed put its own around since, as accelerate has it
    do when a Trainer prepares a model: it would take a run's tokens apart."""
    for key, function in list(_wrapped.items()):
        place, name = key
        now = _functions(place)[name]
        if now is not function.wrapper and model in function.users and ulysses_of(now) is not None:
            _wrap(key, model)


def _unwrap(key: Key, model: PreTrainedModel) -> None:
    (place, name), function = key, _wrapped[key]
    function.users.discard(model)
    if function.users:
        return
    del _wrapped[key]
    functions = _functions(place)
    if functions[name] is not function.wrapper:
        return  # someone wrapped ours again, which passes through
    if place == REGISTRY:  # uncovers the entry that all registries share, if it was that one
        del functions[name]
    if functions.get(name) is not function.original:
        functions[name] = function.original
