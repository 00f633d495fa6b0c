"""The attention function of an attached model: side tokens, and what is read in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from groundkern import asked
from groundkern.beside import ask_beside, take_beside
from groundkern.checks import fail
from groundkern.hf.model.apart import attend_apart
from groundkern.hf.model.body_run import BodyRun, MainMask, Reading
from groundkern.hf.model.engines.ulysses import function_for
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.rows import Chunk, Window
from groundkern.lse import WATCHED, Watch, graph_is_readable, lse_of_graph

# In the __dict__ of text attention modules: the layer's number, and the tokens of its chunks if
# attention stays inside of such.
LAYER, CHUNK = "_groundkern_layer", "_groundkern_chunk"
RUN = "gk_body_run"  # the keyword


class Main(NamedTuple):
    """What attention of the main tokens came to."""

    out: Tensor  # [B, S, Hq, Dv]
    weights: Tensor | None  # of eager attention
    lse: Tensor | None  # [B, Hq, S], if it was asked for and is known


def grounded(attention: Callable, implementation: str) -> Callable:
    """Wrap an attention function: it stays the same function unless a run comes with the call.

    Args:
        attention: an attention function of transformers.
        implementation: its name among them.

    Returns:
        The wrapper.
    """

    @wraps(attention)
    def grounded_attention(module, query, key, value, attention_mask, **kwargs):
        run = kwargs.pop(RUN, None)
        tensors = query, key, value, attention_mask
        if run is None:
            return function_for(attention, module)(module, *tensors, **kwargs)
        return _attend(attention, implementation, run, module, tensors, kwargs)

    return grounded_attention


@torch.compiler.disable  # compiled layers stop here: the run's books would be traced in every layer
def _attend(
    attention: Callable,
    implementation: str,
    run: BodyRun,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor, Any],  # query, key, value and the mask
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer and of its side tokens; every reading of the run reads it."""
    query, key, value, attention_mask = tensors
    number = module.__dict__.get(LAYER)
    if number is None:  # of a vision tower that hands the keyword on
        return function_for(attention, module)(module, *tensors, **kwargs)
    if not run.reads and run.documents is None and run.split is None:
        return attention(module, *tensors, **kwargs)
    length, total = run.length, query.shape[2]
    if run.split is None:
        mask = run.main_mask(implementation, attention_mask, total)
        kwargs |= run.flash_lengths(implementation, mask.mask)
    else:
        mask = MainMask(None, False)
    if run.reads or run.split is not None:
        _refuse(kwargs)
        if not run.finished:
            run.layers += 1
    chunk = module.__dict__.get(CHUNK)
    window = kwargs.get("sliding_window") if chunk is None else Chunk(chunk)
    readings, places = run.asking(number, query, value)
    sinks = kwargs.get("s_aux")
    uses_lse = run.split is None and places is not None
    uses_lse = uses_lse and ((run.uses_lse and mask.shows_all) or run.shifts(places, query.dtype))
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    options = window, {"scale": scale, "softcap": softcap, "backend": run.backend}
    calls = None
    if not uses_lse and sinks is None:
        calls = run.calls(number, readings, options, places, (query, key, value))
    if calls is None:
        q, k, v, own_k, own_v, taken = take_beside(query, key, value, length, places)
    else:
        (q, k, v), answers = ask_beside(calls, places, length, query, key, value)
    positions = kwargs.get("position_ids")
    if positions is not None and length != total == positions.shape[-1]:
        kwargs["position_ids"] = positions[..., :length]
    watched = implementation in WATCHED and uses_lse
    if run.split is not None:
        main = _by_ranks(attention, run, module, (q, k, v), window, kwargs)
    elif implementation == "sdpa" and isinstance(mask.mask, Tensor) and run.several:
        main = _by_documents(attention, run, module, (q, k, v), mask, kwargs, watched)
    else:
        main = _by_rows(attention, implementation, module, (q, k, v), mask.mask, kwargs, watched)
    if calls is None:
        lse = {} if main.lse is None else places.taken(main.lse)
        rest = *options, taken, lse, not mask.shows_all, sinks
        side = _read(run, Layer(number, module, q, own_k, own_v, main.out, *rest))
    else:
        side = _took(run, number, window, readings, answers)
    if side is None:
        return main.out, main.weights
    side = side if side.dtype == main.out.dtype else side.to(main.out.dtype)
    return torch.cat((main.out, side), 1), main.weights


def _took(
    run: BodyRun,
    number: int,
    window: Window,
    readings: Sequence[Reading],
    answers: Sequence[tuple[Tensor, ...]],
) -> Tensor | None:
    """Let readings take what a layer answered; [B, R, Hq, Dv] of the side tokens, if there are
    any."""
    side = None
    if run.side is not None:
        (out, _), *answers = answers
        side = run.side.slots(out)
    for reading, (answer,) in zip(readings, answers, strict=True):
        reading.take(run.finished, number, window, answer)
    return side


def _read(run: BodyRun, layer: Layer) -> Tensor | None:
    """Let every reading read a layer; [B, R, Hq, Dv] of the side tokens, if there are any."""
    found = [reading.read(run, layer) for reading in run.readings]
    questions = [question for question in found if question is not None]
    calls, side = [question.asked for question in questions], run.side
    if side is None or run.split is not None:
        answers = asked.run(calls)
        out = None if side is None else side.attend_split(layer)
    else:
        attended, *answers = asked.run([side.ask(layer), *calls])
        out = side.attended(layer, *attended)
    for question, (answer,) in zip(questions, answers, strict=True):
        question.take(answer)
    return out


def _by_rows(
    attention: Callable,
    implementation: str,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    kwargs: dict,
    watched: bool,
) -> Main:
    """The attention function, called once."""
    saved = watched and implementation == "sdpa" and graph_is_readable(*tensors)
    with Watch() if watched and not saved else nullcontext() as watch:
        out, weights = attention(module, *tensors, mask, **kwargs)
    lse = None if watch is None else watch.lse(tensors[0])
    return Main(out, weights, lse_of_graph(out, tensors[0]) if saved else lse)


def _by_documents(
    attention: Callable,
    run: BodyRun,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: MainMask,
    kwargs: dict,
    watched: bool,
) -> Main:
    """The same for packed rows: torch's attention would compute whole rows with a mask."""
    saved = watched and graph_is_readable(*tensors)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    own = None if mask.plain and causal else mask.mask
    out, lse = attend_apart(attention, module, tensors, own, run.documents, kwargs, saved=saved)
    return Main(out, None, lse)


def _by_ranks(
    attention: Callable,
    run: BodyRun,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    window: Window,
    kwargs: dict,
) -> Main:
    """The same where keys are on several ranks."""
    if kwargs.get("s_aux") is not None:
        fail("s_aux", "attention without sinks where a sequence is split over ranks", "a tensor")
    split, engine = run.split, run.split.engine
    out = engine(attention, module, *tensors, split.shard, run.first_key, window, kwargs)
    return Main(out, None, None)


def _refuse(kwargs: dict) -> None:
    """Refuse by name what the ops do not compute."""
    if kwargs.get("dropout"):
        fail("attention_dropout", "0 in training", kwargs["dropout"])
    for name in ("sinks", "position_bias", "head_mask", "block_indices"):
        if kwargs.get(name) is not None:
            fail(name, "softmax attention over all visible keys, without biases", "a tensor")
