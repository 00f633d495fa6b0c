"""One run of a model's body as its attention layers see it.

A `BodyRun` travels through the layers as a keyword. What it collects are plain Python lists and
running sums: when checkpointing recomputes a layer, the layer does the same mathematics and the
sums stay as they are, because the run has been marked as finished by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from groundkern.asked import Asked
from groundkern.beside import OfRows
from groundkern.calls import is_direct, signature
from groundkern.checks import fail
from groundkern.hf.model.context import Split
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.layer import Layer, Question, SideRows
from groundkern.hf.model.rows import Rows, Window
from groundkern.taken import Places, joins_by_kernel

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
        places: Places | None,
        tensors: tuple[Tensor, Tensor, Tensor],
    ) -> list[OfRows] | None:
        """What is asked of a layer before its main pass, made once for layers that are alike; None
        if something of it depends on more than `Reading.alike` says, needs torch's dispatcher, or
        has no graph.

        Args:
            number: of the layer.
            readings: those that take rows of it.
            options: as a `Layer` has them.
            places: of the rows.
            tensors: q, k and v [B, H, T, D] of all tokens.
        """
        trains = torch.is_grad_enabled() and tensors[0].requires_grad
        if places is None or not (self.alike and trains and is_direct(tensors)):
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

    def shifts(self, places: Places, dtype: torch.dtype) -> bool:
        """Whether the main pass's log-sum-exp saves side attention more than it takes to find.

        It is a shift there and never changes a result. It spares the Triton kernel instructions (of
        fp16 it uses none), which count where many keys are read. To find it takes the host 0.03 to
        0.05 ms in every layer, and more under checkpointing, where no graph can be read; and the
        ops of a layer that need not wait for it are one node with their rows (`ask_beside`).

        Args:
            places: of the rows.
            dtype: of the queries.
        """
        by_triton = places.join is not None and dtype == torch.bfloat16
        return self.side is not None and by_triton and self.length >= SHIFT_FROM

    def refuse_lost_graph(self, what: str) -> None:
        """Raise when a layer runs without the graph that `what` needs.

        Raises:
            ValueError: reentrant checkpointing.
        """
        if self.grad_enabled and not torch.is_grad_enabled():
            wanted = f"use_reentrant=False: reentrant checkpointing drops the gradient of {what}"
            fail("gradient_checkpointing_kwargs", wanted, "use_reentrant=True")


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
