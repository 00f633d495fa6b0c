"""One attention layer as ops beside its main pass see it, and the rows of side tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundkern import asked, parallel, side_attention
from groundkern.asked import Asked, Repeated
from groundkern.checks import fail
from groundkern.hf.model.chosen_heads import key_heads, take_heads
from groundkern.hf.model.context import Split
from groundkern.hf.model.rows import Rows, Window
from groundkern.selection import KeySets
from groundkern.taken import Taken


class Layer(NamedTuple):
    """One attention layer of the main pass; side tokens are not among its S positions.

    `k` and `v` are for ops beside the main pass: their gradients come apart from its own.
    """

    number: int
    module: nn.Module
    q: Tensor  # [B, Hq, S, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    out: Tensor  # [B, S, Hq, Dv]
    window: Window  # how far back its rows see
    options: dict  # scale, softcap and backend of the ops
    taken: Taken  # [N, Hq, D] of `q`
    lse: Taken  # [N, Hq] of the main pass's log-sum-exp, if it is known
    masked: bool  # a mask hides keys from the main pass: `lse` may not be a normaliser
    sinks: Tensor | None  # [Hq], one more logit of each head that takes part in its softmax

    def queries(self, rows: Rows) -> Tensor:
        """[N, Hq, D] of some rows; of this rank's own."""
        taken = self.taken.get(rows)
        if taken is not None:
            return taken
        at = rows.at(self.window) if rows.shard is None else rows.sharded(self.window)
        return at.take(self.q)

    def normaliser(self, rows: Rows) -> Tensor | None:
        """[N, Hq], differentiable: the log-sum-exp of rows and their sinks; None without sinks."""
        if self.sinks is None:
            return None
        options = {**self.options, "lse": self.lse.get(rows)}
        of_keys = side_attention(
            self.queries(rows), self.k, self.v, rows.at(self.window), **options
        ).lse
        return torch.logaddexp(of_keys, self.sinks.to(of_keys.dtype))

    def at_heads(self, rows: Rows, heads: Sequence[int]) -> Layer:
        """The layer as if it had these heads alone, for one selection of rows.

        Args:
            rows: whose queries and log-sum-exps are taken.
            heads: ascending.

        Raises:
            ValueError: the layer has fewer heads.
        """
        count = self.q.shape[1]
        if heads[-1] >= count:
            fail("chosen_heads", f"heads in [0, {count}) of layer {self.number}", heads[-1])
        keys = key_heads(heads, count // self.k.shape[1])
        sinks, lse = self.sinks, self.lse.get(rows)
        return self._replace(
            k=take_heads(self.k, keys),
            v=self.v if sinks is None else take_heads(self.v, keys),  # only sinks need it
            taken={rows: take_heads(self.queries(rows), heads)},
            lse={} if lse is None else {rows: take_heads(lse, heads)},
            sinks=None if sinks is None else take_heads(sinks[None], heads)[0],
        )


class Question(NamedTuple):
    """What a reading asks of a layer; all of a layer's are answered together."""

    asked: Asked
    take: Callable[[Tensor], None]  # is given the result


class SideRows:
    """The aligned rows and the keys they may see: attention of the side tokens (S1)."""

    alike = True  # as a `Reading`'s

    def __init__(self, rows: Rows, allowed: KeySets | None, split: Split | None = None) -> None:
        self.rows, self.allowed, self.split = rows, allowed, split
        self._repeated = Repeated()

    def allowed_in(self, layer: Layer) -> KeySets | None:
        """The keys they may see in a layer."""
        return self.allowed

    def attend(self, layer: Layer) -> Tensor:
        """[B, R, Hq, Dv] of the side tokens of whole sequences."""
        return self.attended(layer, *asked.run([self.ask(layer)])[0])

    def attend_split(self, layer: Layer) -> Tensor:
        """[B, R, Hq, Dv] of those that are here, where keys are on several ranks."""
        rows, own = self.rows, self.rows.sharded(layer.window)
        options = {**layer.options, "allowed": self.allowed}
        out = parallel.side_attention(layer.queries(rows), layer.k, layer.v, own, **options).out
        whole = out.new_zeros(len(own), *out.shape[1:]).index_copy(0, own.own, out)
        return self.split.side_slots(whole.view(*rows.shape, *out.shape[1:]))

    def ask(self, layer: Layer) -> Asked:
        """Their attention in a layer. The main pass's log-sum-exp is a shift, which may be
        anything."""
        rows, allowed = self.rows, self.allowed_in(layer)
        q, lse = layer.queries(rows), layer.lse.get(rows)

        def make() -> Asked:
            options = {"allowed": allowed, "lse": lse, **layer.options}
            return asked.side_attention(q, layer.k, layer.v, rows.at(layer.window), **options)

        options = layer.window, layer.options, id(allowed)  # of which the call holds the bits
        return self._repeated(options, {"q": q, "k": layer.k, "v": layer.v, "lse": lse}, make)

    def attended(self, layer: Layer, out: Tensor, lse: Tensor) -> Tensor:
        """[B, R, Hq, Dv] of what was answered."""
        if layer.sinks is not None:  # the share of the keys beside the sink
            out = out * (lse - layer.sinks.to(lse.dtype)).sigmoid()[..., None]
        return self.slots(out)

    def slots(self, out: Tensor) -> Tensor:
        """[B, R, Hq, Dv] of [B * R, Hq, Dv]."""
        return out.view(*self.rows.shape, *out.shape[1:])
