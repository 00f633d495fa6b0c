"""The attention function of an attached model: side tokens, and what is read in every layer.

A `BodyRun` travels through the layers as a keyword. What it collects are plain Python lists and
running sums: when checkpointing recomputes a layer, the layer does the same mathematics and the
sums stay as they are, because the run has been marked as finished by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from groundkern import asked
from groundkern.asked import Asked
from groundkern.beside import OfRows, ask_beside, take_beside
from groundkern.calls import is_direct, signature
from groundkern.checks import fail
from groundkern.hf.model.apart import attend_apart
from groundkern.hf.model.context import Split
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.engines.ulysses import function_for
from groundkern.hf.model.layer import Layer, Question, SideRows
from groundkern.hf.model.rows import Chunk, Rows, Window
from groundkern.lse import WATCHED, Watch, graph_is_readable, lse_of_graph
from groundkern.taken import Places, joins_by_kernel

# In the __dict__ of text attention modules: the layer's number, and the tokens of its chunks if
# attention stays inside of such.
LAYER, CHUNK = "_groundkern_layer", "_groundkern_chunk"
RUN = "gk_body_run"  # the keyword
SHIFT_FROM = 32768  # tokens, from computed times (docs/ops/gpu.md); not measured on a device


class Reading(Protocol):
    """What a loss or a recording reads in every layer."""

    uses_lse: bool  # whether the main pass's log-sum-exp spares work
    # Whether each layer in which it takes rows is asked `ask`, which depends on the layer's window
    # and options and on tensors before its main pass alone, and answers to `take`.
    alike: bool

    def rows_in(self, number: int) -> Rows | None:
        """The rows whose queries it takes from the layer of this number, if it takes any."""

    def read(self, run: BodyRun, layer: Layer) -> Question | None:
        """Add one layer, at once or by an answer; once the run is finished, compute the same and
        add nothing."""

    def ask(self, layer: Layer) -> Asked:
        """What a layer is asked, if layers are alike."""

    def take(self, finished: bool, number: int, window: Window, answer: Tensor) -> None:
        """Add what a layer answered; once the run is finished, nothing."""


class MainMask(NamedTuple):
    """The mask of the main tokens, and what was found out about it."""

    mask: Any  # [B, S], [B, 1 or H, S, S], or None
    plain: bool  # documents are apart and causal, and it says nothing else

    @property
    def shows_all(self) -> bool:
        """Whether a token sees everything before it in its document, or all keys but a window's."""
        return self.mask is None or self.plain


class Main(NamedTuple):
    """What attention of the main tokens came to."""

    out: Tensor  # [B, S, Hq, Dv]
    weights: Tensor | None  # of eager attention
    lse: Tensor | None  # [B, Hq, S], if it was asked for and is known


class Asking(NamedTuple):
    """What takes rows of a layer."""

    readings: tuple[Reading, ...]
    places: Places | None  # of their rows and of the side tokens'; None: there are none


class BodyRun:
    """One run of the body as its attention layers see it.

    Args:
        length: S; side tokens come after it.
        backend: of the ops.
        readings: what to read in every layer.
        side: the rows of the side tokens; None: there are none.
        documents: those of the rows; None: a row is one.
        guarded: look at every mask whether it keeps the documents apart.
        split: of the tokens over ranks, of which `length` are here; None: all are.
        first_key: int32 [B, S], the first key that each token of whole sequences may see, if they
            are split.
    """

    def __init__(
        self,
        length: int,
        backend: str,
        readings: Sequence[Reading],
        side: SideRows | None = None,
        documents: Documents | None = None,
        guarded: bool = False,
        split: Split | None = None,
        first_key: Tensor | None = None,
    ) -> None:
        self.length, self.backend, self.readings, self.side = length, backend, readings, side
        self.documents, self.guarded = documents, guarded
        self.split, self.first_key = split, first_key
        self.grad_enabled = torch.is_grad_enabled()
        self.uses_lse = any(reading.uses_lse for reading in readings)
        self.layers = 0  # of softmax attention that ran so far
        self.mixers = 0  # recurrences and convolutions that ran so far on the main tokens alone
        self.finished = False  # a layer that runs now is recomputed by checkpointing
        asking = [*readings, *([] if side is None else [side])]
        self.alike = split is None and not self.uses_lse and all(each.alike for each in asking)
        self._asking: dict[int, Asking] = {}
        # (signature of the tensors, options, readings, calls): a few, compared one by one because
        # hashing them takes longer
        self._calls: list[tuple[tuple, tuple, tuple, list[OfRows] | None]] = []
        self._places: dict[tuple[Rows, ...], Places] = {}
        self._masks: list[tuple[Any, MainMask]] = []

    def main_mask(self, implementation: str, attention_mask: Any, total: int) -> MainMask:
        """The mask of the main tokens, looked at once for all layers that share it.

        Args:
            implementation: the name of the attention function.
            attention_mask: as that is given it.
            total: T, with the side tokens.

        Raises:
            ValueError: a mask of another form, or one that shows a token those of another document.
        """
        for given, found in self._masks:
            if given is attention_mask:
                return found
        mask, plain = crop(attention_mask, self.length, total), False
        if self.guarded and "flash" not in implementation:  # which has no mask of documents
            plain = self.documents.refuse_leak(mask)
        found = MainMask(mask, plain)
        self._masks.append((attention_mask, found))
        return found

    def flash_lengths(self, implementation: str, mask: Any) -> dict[str, Any]:
        """The lengths of documents as keywords for flash attention.

        From positions it would find those of a single row only.

        Args:
            implementation: the name of the attention function.
            mask: of the main tokens.
        """
        packed = self.documents is not None and "flash" in implementation and mask is None
        return self.documents.lengths if packed else {}

    @property
    def several(self) -> bool:
        """Whether any row has several documents."""
        return self.documents is not None and self.documents.several

    @property
    def reads(self) -> bool:
        """Whether anything is read or computed in the layers."""
        return self.side is not None or bool(self.readings)

    def asking(self, number: int, q: Tensor, v: Tensor) -> Asking:
        """What takes rows of a layer of T tokens; found once.

        Args:
            number: of the layer.
            q, v: [B, H, T, D] of all tokens.
        """
        found = self._asking.get(number)
        if found is not None:
            return found
        rows = {reading: reading.rows_in(number) for reading in self.readings}
        rows = {reading: x for reading, x in rows.items() if x is not None}
        side = [] if self.side is None else [self.side.rows]
        selections = tuple(dict.fromkeys((*rows.values(), *side)))
        if selections and selections not in self._places:
            self._places[selections] = Places(
                selections, q.shape[2], joins_by_kernel(self.backend, q, v)
            )
        found = self._asking[number] = Asking(tuple(rows), self._places.get(selections))
        return found

    def calls(
        self,
        number: int,
        readings: tuple[Reading, ...],
        options: tuple[Window, dict],
        places: Places,
        tensors: tuple[Tensor, Tensor, Tensor],
    ) -> list[OfRows] | None:
        """What is asked of a layer before its main pass, made once for layers that are alike; None
        if its calls need torch's dispatcher.

        Args:
            number: of the layer.
            readings: those that take rows of it.
            options: as a `Layer` has them.
            places: of the rows.
            tensors: q, k and v [B, H, T, D] of all tokens.
        """
        if not is_direct(tensors):
            return None
        signed = signature(tensors)
        for of, asked_with, by, found in self._calls:
            if of == signed and asked_with == options and by == readings:
                return found
        q, k, v = (x.detach()[:, :, : self.length] for x in tensors)
        with torch.no_grad():
            layer = Layer(number, None, q, k, v, None, *options, places.taken(q), {}, False, None)
            found = self._made(readings, places, layer)
        self._calls.append((signed, options, readings, found))
        return found

    def _made(
        self, readings: tuple[Reading, ...], places: Places, layer: Layer
    ) -> list[OfRows] | None:
        """The same, not yet known."""
        asking = [(reading, reading.rows_in(layer.number)) for reading in readings]
        if self.side is not None:
            asking.insert(0, (self.side, self.side.rows))
        found = []
        for each, rows in asking:
            asked = each.ask(layer)
            inputs, of_v = asked.inputs, (None, layer.v)
            as_given = inputs.q is layer.taken[rows] and inputs.k is layer.k
            as_given &= any(inputs.v is x for x in of_v)
            learned = any(x is not None and x.requires_grad for x in inputs[3:])
            if learned or not (as_given and asked.direct):  # autocast may have cast them
                return None
            found.append(OfRows.of(places.selections.index(rows), asked))
        return found

    def shifts(self, places: Places, q: Tensor) -> bool:
        """Whether the main pass's log-sum-exp saves side attention more than it takes to find.

        It is a shift there and never changes a result. It spares the Triton kernel instructions (of
        fp16 it uses none), which count where many keys are read. To find it takes the host 0.03 to
        0.05 ms in every layer, and more under checkpointing, where no graph can be read.

        Args:
            places: of the rows.
            q: [B, Hq, S, D], of the main pass.
        """
        by_triton = places.join is not None and q.dtype == torch.bfloat16
        return self.side is not None and by_triton and q.shape[2] >= SHIFT_FROM

    def refuse_lost_graph(self, what: str) -> None:
        """Raise when a layer runs without the graph that `what` needs.

        Raises:
            ValueError: reentrant checkpointing.
        """
        if self.grad_enabled and not torch.is_grad_enabled():
            wanted = f"use_reentrant=False: reentrant checkpointing drops the gradient of {what}"
            fail("gradient_checkpointing_kwargs", wanted, "use_reentrant=True")


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
    uses_lse = uses_lse and ((run.uses_lse and mask.shows_all) or run.shifts(places, query))
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    options = window, {"scale": scale, "softcap": softcap, "backend": run.backend}
    calls = None
    if run.alike and places is not None and not uses_lse and sinks is None:
        if torch.is_grad_enabled() and query.requires_grad:
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


def crop(mask, length: int, total: int):
    """The mask of the first `length` positions of T.

    Args:
        mask: [B, T] or [B, H, T, T] of an attention function or a mixer, or None.
        length: S, the main tokens.
        total: T, with the side tokens.

    Returns:
        The mask of the main tokens.

    Raises:
        ValueError: a mask of another form.
    """
    if mask is None or length == total:
        return mask
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):  # FlexAttention's BlockMask
        fail("attention_mask", "a tensor of 2 or 4 dimensions, or None", type(mask).__name__)
    return mask[:, :length] if mask.dim() == 2 else mask[:, :, :length, :length]
