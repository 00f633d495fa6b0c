"""Recurrences and convolutions of an attached model: they run on the main tokens alone.

A side token stands behind the sequence, where a recurrence would see everything before it. So in a
run with side tokens a mixer gets the S main tokens, and each side token the mixer's output at its
row: with every key allowed it is what the row itself gets.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groundkern.checks import fail
from groundkern.hf.model.attention import RUN
from groundkern.hf.model.body_run import BodyRun, crop
from groundkern.hf.model.layers import text_layers
from groundkern.hf.model.rows import take_rows

REPLACED = "_groundkern_replaced"  # in the __dict__ of a mixer: the forward it had there, or None
COUNT = "_groundkern_mixers"  # in the __dict__ of a model


def wrap_mixers(model: PreTrainedModel) -> None:
    """Let the mixers of a model know side tokens.

    Args:
        model: the model that is attached, without wrappers.
    """
    mixers = [layer.mixer for layer in text_layers(model) if layer.mixer is not None]
    for mixer in mixers:
        if REPLACED not in mixer.__dict__:
            mixer.__dict__[REPLACED] = mixer.__dict__.get("forward")
            mixer.forward = MethodType(_on_main_tokens, mixer)
    model.__dict__[COUNT] = len(mixers)


def unwrap_mixers(model: PreTrainedModel) -> None:
    """Undo `wrap_mixers`.

    Args:
        model: the model that is detached, without wrappers.
    """
    model.__dict__.pop(COUNT, None)
    for module in model.modules():
        if REPLACED not in module.__dict__:
            continue
        replaced = module.__dict__.pop(REPLACED)
        if getattr(module.__dict__.get("forward"), "__func__", None) is _on_main_tokens:
            del module.forward  # a forward that someone wrapped around ours stays
            if replaced is not None:
                module.forward = replaced


def refuse_passed_over(model: PreTrainedModel, run: BodyRun) -> None:
    """Raise if a mixer did not hear of the side tokens.

    Args:
        model: the attached model, without wrappers.
        run: a run of its body.

    Raises:
        ValueError: fewer mixers than the model has ran on the main tokens.
    """
    wanted = model.__dict__.get(COUNT, 0)
    if run.side is not None and run.mixers != wanted:
        got = f"{run.mixers} in {type(model).__name__}"
        fail("smam", f"{wanted} recurrences and convolutions that get the layers' keywords", got)


def _on_main_tokens(self: nn.Module, *args, **kwargs):
    """A mixer's forward."""
    run: BodyRun | None = kwargs.pop(RUN, None)
    forward: Callable = self.__dict__.get(REPLACED) or MethodType(type(self).forward, self)
    if run is None or run.side is None:
        return forward(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    length, total = run.length, hidden.shape[1]
    names = ("hidden_states", *(f"argument {i}" for i in range(1, len(args))))
    args = [_main_part(name, x, length, total) for name, x in zip(names, args, strict=False)]
    kwargs = {name: _main_part(name, x, length, total) for name, x in kwargs.items()}
    found = forward(*args, **kwargs)
    out, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, None)
    rows = run.side.rows
    out = torch.cat((out, take_rows(out, rows.position.view(-1, rows.rows))), 1)
    if not run.finished:
        run.mixers += 1
    return out if rest is None else (out, *rest)


def _main_part(name: str, x: object, length: int, total: int) -> object:
    """An argument of a mixer without the side tokens."""
    if isinstance(x, tuple) and name == "position_embeddings":
        return tuple(each[..., :length, :] for each in x)
    if not isinstance(x, Tensor):
        return x
    if name == "hidden_states":
        return x[:, :length]
    if name == "attention_mask":
        return crop(x, length, total)
    if name == "position_ids":
        return x[..., :length]
    if total in x.shape:
        wanted = "a mixer's only inputs per token to be hidden states, mask and positions"
        fail(name, wanted, list(x.shape))
    return x
