"""The attention function of an attached model, and what it hands back to the root forward.

A record travels through the layers as a keyword. It is a plain class of running sums: under
checkpointing the second run of a layer does the same mathematics and leaves the sums alone, because
the root has closed the record by then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import attention_map, side_attention
from groundkern.checks import fail
from groundkern.hf.supervision import Rows
from groundkern.lse import WATCHED, Watch
from groundkern.selection import KeySets, QueryRows

LAYER = "_groundkern_layer"  # in the __dict__ of text attention modules: the layer's number
RECORD = "gk_layer_record"


class SideRows:
    """The aligned rows and what they may see: attention of the side tokens (S1)."""

    def __init__(self, rows: Rows, allowed: KeySets) -> None:
        self.rows, self.allowed = rows, allowed

    def attend(self, q, k, v, window: int | None, how: dict, lse: Tensor | None = None) -> Tensor:
        """[B, R, Hq, Dv] from the main pass's q [B, Hq, S, D], k, v and, where seen, lse."""
        rows = self.rows.at(window)
        how = {**how, "lse": rows_of_lse(rows, lse)}
        out = side_attention(rows.take(q), k, v, rows, allowed=self.allowed, **how).out
        return out.unflatten(0, (len(k), len(out) // len(k)))


class MapMean:
    """The attention map of the map rows over their image, of every layer (K1), (K2)."""

    over = "columns"

    def __init__(self, rows: Rows, columns: Tensor, allowed: KeySets) -> None:
        self.rows, self.columns, self.allowed = rows, columns, allowed
        self.layers: list[Tensor] = []  # [N, C] each

    def read(self, record: Record, module: nn.Module, q, k, v, window, how: dict) -> None:
        """Add one layer; no gradient."""
        rows, how = self.rows.at(window), {**how, "allowed": self.allowed, "over": self.over}
        if record.open:
            with torch.no_grad():
                self.layers.append(attention_map(rows.take(q), k, rows, self.columns, **how))


class KeptLayer(NamedTuple):
    """One layer's attention of N rows: what (C1) and GradCAM are made of."""

    module: nn.Module
    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    out: Tensor  # [N, Hq, Dv]
    full: Tensor  # [B, S, Hq, Dv], in the graph where there is one
    rows: QueryRows
    how: dict


class Kept:
    """Every layer's attention of some rows, for readings that need the end of the run.

    Keeps k and v of all layers, as a cache for generation would.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.layers = rows, []
        self.position = rows.position.clamp(min=0).long()  # [N]

    def keep(self, module: nn.Module, q, k, v, out: Tensor, window, how: dict) -> None:
        """Add one layer."""
        if torch.is_grad_enabled() and not out.requires_grad:  # nothing below is trainable
            out.requires_grad_()
        rows = self.rows.at(window)
        own = out.detach()[rows.sequence.long(), self.position]
        q, k, v = (x.detach() for x in (rows.take(q), k, v))
        self.layers.append(KeptLayer(module, q, k, v, own, out, rows, how))


class Record:
    """What one root forward asks of its attention layers."""

    def __init__(self, length: int, backend: str) -> None:
        self.length = length  # S; side tokens come after it
        self.backend = backend
        self.grad_enabled = torch.is_grad_enabled()
        self.side: SideRows | None = None
        self.kept: Kept | None = None
        self.explained = None  # `gradcam.Explained`
        # Each has `over` and `read(record, module, q, k, v, window, how)`.
        self.readings: list = []
        self.calls = 0
        self.normaliser: Tensor | None = None  # [B, Hq, S] of the layer at hand, where it is exact
        self.open = True

    @property
    def uses_lse(self) -> bool:
        """Whether anything takes the main pass's log-sum-exp, as a shift or as the normaliser."""
        return self.side is not None or any(x.over == "visible" for x in self.readings)


def grounded(attention: Callable) -> Callable:
    """Wrap an attention function: the same function unless a record comes with the call."""

    @wraps(attention)
    def grounded_attention(module, query, key, value, attention_mask, **kwargs):
        record = kwargs.pop(RECORD, None)
        if record is None or LAYER not in module.__dict__:
            return attention(module, query, key, value, attention_mask, **kwargs)
        _refuse(kwargs)
        if record.open:
            record.calls += 1
        length, total = record.length, query.shape[2]
        q, k, v = query[:, :, :length], key[:, :, :length], value[:, :, :length]
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] == total:
            kwargs["position_ids"] = positions[..., :length]
        mask = _crop(attention_mask, length, total)
        with _watch(record, module) as seen:
            out, weights = attention(module, q, k, v, mask, **kwargs)
        lse = None if seen is None else seen.lse(q)
        # A shift may be anything; a normaliser must be of the very keys the rows see.
        record.normaliser = lse if mask is None else None
        how = {
            "scale": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "backend": record.backend,
        }
        window = kwargs.get("sliding_window")
        for reading in record.readings:
            reading.read(record, module, q, k, v, window, how)
        if record.kept is not None and record.open:
            record.kept.keep(module, q, k, v, out, window, how)
        if record.explained is not None:
            record.explained.keep(record, module, q, k, v, out, window, how)
        if record.side is not None:
            side = record.side.attend(q, k, v, window, how, lse)
            out = torch.cat((out, side.to(out.dtype)), 1)
        record.normaliser = None
        return out, weights

    return grounded_attention


def _watch(record: Record, module: nn.Module):
    """A watch for the main pass's log-sum-exp where a reading uses it and it may be seen."""
    watched = module.config._attn_implementation in WATCHED and not torch.compiler.is_compiling()
    return Watch() if watched and record.uses_lse else nullcontext()


def rows_of_lse(rows: QueryRows, lse: Tensor | None) -> Tensor | None:
    """[N, Hq] of lse [B, Hq, S]."""
    return None if lse is None else rows.take(lse[..., None])[..., 0]


def _refuse(kwargs: dict) -> None:
    """Refuse by name what the ops do not compute."""
    if kwargs.get("dropout"):
        fail("attention_dropout", "0 in training", kwargs["dropout"])
    for name in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            fail(name, "softmax attention without sinks, biases or head masks", "a tensor")


def _crop(mask, length: int, total: int):
    """The mask of the first `length` positions."""
    if mask is None or length == total:
        return mask
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):  # FlexAttention's BlockMask
        fail("attention_mask", "a tensor of 2 or 4 dimensions, or None", type(mask).__name__)
    return mask[:, :length] if mask.dim() == 2 else mask[:, :, :length, :length]
