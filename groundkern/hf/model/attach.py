"""Put grounding supervision on a transformers model, and take it off again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundkern.backends import NAMES
from groundkern.checks import fail
from groundkern.hf.model.attention import LAYER, grounded
from groundkern.hf.model.forward import grounded_forward
from groundkern.hf.model.head_weight import set_head_weight
from groundkern.hf.model.support import base_model, refuse_unsupported, text_attention
from groundkern.hf.objectives import DvSft, Hist, Klal, LogitLens, Margins, Objectives, Smam

ATTACHMENT = "_groundkern"  # in the __dict__ of an attached model


@dataclass(frozen=True)
class Attachment:
    """What `attach` left on a model."""

    objectives: Objectives
    replaced: Callable | None  # the forward that the instance had of its own, if any


@dataclass
class WrappedFunction:
    """An attention function that is wrapped in place, and the models that need it to be."""

    original: Callable
    wrapper: Callable
    users: WeakSet


# By name in the registry, or by modeling file for "eager", which is a global of that file.
_wrapped: dict[tuple[str, str], WrappedFunction] = {}


def attach(
    model: nn.Module,
    *,
    smam: Smam | None = None,
    dv_sft: DvSft | None = None,
    klal: Klal | None = None,
    hist: Hist | None = None,
    margins: Margins | None = None,
    logit_lens: LogitLens | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Let `model(**batch)` compute grounding losses when the batch carries `gk_` tensors.

    Without them the model behaves as before: generation, saving and ordinary training are
    untouched. Works before or after PEFT; attach before wrapping for DDP, FSDP or compile.
    Attaching again replaces the objectives.

    Args:
        model: a transformers model, bare or inside PEFT.
        smam, dv_sft, klal, hist, margins, logit_lens: the objectives to train beside the text loss;
            None: not trained.
        backend: of every op.

    Returns:
        The same `model`. With `gk_` inputs its forward returns a `GroundedOutput`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an architecture that the wiring does not support, by name.
    """
    base = base_model(model)
    if backend not in ("auto", *NAMES):
        fail("backend", " | ".join(("auto", *NAMES)), backend)
    objectives = Objectives(smam, dv_sft, klal, hist, margins, logit_lens, backend)
    refuse_unsupported(base, objectives)
    for layer, module in enumerate(text_attention(base)):
        module.__dict__[LAYER] = layer
        _wrap(_function_of(module), base)
    previous = base.__dict__.get(ATTACHMENT)
    replaced = previous.replaced if previous else base.__dict__.get("forward")
    base.__dict__[ATTACHMENT] = Attachment(objectives, replaced)
    set_head_weight(base, klal)
    if previous is None:
        base.forward = MethodType(_patched_forward(type(base)), base)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`; a model that is not attached is left alone.

    The attention function is restored when the last attached model that uses it is detached.
    """
    base = base_model(model)
    attachment = base.__dict__.pop(ATTACHMENT, None)
    if attachment is None:
        return model
    set_head_weight(base, None)
    forward = base.__dict__.get("forward")
    if getattr(forward, "__func__", None) is _patched_forward(type(base)):
        del base.forward  # a forward that someone wrapped around ours stays, and passes through
        if attachment.replaced is not None:
            base.forward = attachment.replaced
    for module in text_attention(base):
        module.__dict__.pop(LAYER, None)
    for key in [key for key, function in _wrapped.items() if base in function.users]:
        _unwrap(key, base)
    return model


def objectives_of(model: nn.Module) -> Objectives:
    """The objectives attached to a model.

    Raises:
        ValueError: a model that is not attached.
    """
    attachment = base_model(model).__dict__.get(ATTACHMENT)
    if attachment is None:
        fail("model", "a model that groundkern.hf.attach was called on", "one without")
    return attachment.objectives


@cache
def _patched_forward(model_class: type[PreTrainedModel]) -> Callable:
    """One forward per class, with the class's signature: generation and trainers inspect it."""

    def forward(self, *args, **kwargs):
        attachment = self.__dict__.get(ATTACHMENT)
        if attachment is not None and any(name.startswith("gk_") for name in kwargs):
            names = list(inspect.signature(type(self).forward).parameters)[1:]
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            return grounded_forward(self, attachment.objectives, inputs)
        replaced = attachment.replaced if attachment is not None else None
        if replaced is not None:
            return replaced(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)
    return forward


def _function_of(module: nn.Module) -> tuple[str, str]:
    """Where the attention function of a module is looked up: (registry, name) or (file, eager)."""
    name = module.config._attn_implementation
    if name != "eager":
        return "registry", name
    return type(module).__module__, "eager_attention_forward"


def _get(key: tuple[str, str]) -> Callable:
    place, name = key
    return (
        ALL_ATTENTION_FUNCTIONS[name] if place == "registry" else getattr(sys.modules[place], name)
    )


def _set(key: tuple[str, str], function: Callable) -> None:
    place, name = key
    if place == "registry":
        ALL_ATTENTION_FUNCTIONS[name] = function
    else:
        setattr(sys.modules[place], name, function)


def _wrap(key: tuple[str, str], model: PreTrainedModel) -> None:
    function = _wrapped.get(key)
    if function is None or _get(key) is not function.wrapper:  # new, or replaced by someone since
        original, users = _get(key), function.users if function else WeakSet()
        function = _wrapped[key] = WrappedFunction(original, grounded(original), users)
        _set(key, function.wrapper)
    function.users.add(model)


def _unwrap(key: tuple[str, str], model: PreTrainedModel) -> None:
    function = _wrapped[key]
    function.users.discard(model)
    if function.users:
        return
    del _wrapped[key]
    if _get(key) is not function.wrapper:
        return  # someone wrapped ours again, which passes through
    place, name = key
    if place == "registry":
        del ALL_ATTENTION_FUNCTIONS[
            name
        ]  # uncovers the entry that all registries share, if it was that one
    if place != "registry" or ALL_ATTENTION_FUNCTIONS.get(name) is not function.original:
        _set(key, function.original)
