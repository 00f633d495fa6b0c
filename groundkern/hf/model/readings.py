"""What the losses read in every attention layer: running sums with a gradient.

The attention function (attention.py) calls `read` of each reading, layer by layer. Sums are plain
tensors, so that a layer that is run a second time under checkpointing leaves them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundkern import attention_kl, attention_map
from groundkern.checks import fail
from groundkern.hf.model.attention import LAYER, MapMean, Record, rows_of_lse
from groundkern.hf.model.head_weight import HEAD_WEIGHT
from groundkern.hf.model.request import Call
from groundkern.hf.objectives import Klal
from groundkern.hf.supervision import Rows, map_sets
from groundkern.losses import map_divergence
from groundkern.selection import KeySets, QueryRows


@dataclass(frozen=True)
class MapRows:
    """Rows, the key columns of their maps, and which of these are a row's own.

    Args:
        rows: N = B x R rows.
        columns: int32 [B, C].
        allowed: the keys of each row's own image; None: every column is.
        image: bool [N, C], the columns of each row's own image; None: every column is.
    """

    rows: Rows
    columns: Tensor
    allowed: KeySets | None = None
    image: Tensor | None = None

    def own(self, window: int | None) -> Tensor:
        """bool [N, C]: the columns that a row has and sees."""
        rows = self.rows.at(window)
        columns = self.columns[rows.sequence.long()]  # [N, C]
        seen = (columns >= 0) & (columns >= rows.start[:, None]) & (columns < rows.stop[:, None])
        return seen if self.image is None else seen & self.image


class _Reading:
    """A reading of some layers that carries gradients.

    Args:
        at: the rows.
        layers: those that count; None: all.
        over: as in `Klal`.
        head_weight: [L, H]; None: the head mean.
    """

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None,
        over: str,
        head_weight: Tensor | None,
    ) -> None:
        self.at, self.layers, self.head_weight = at, layers, head_weight
        # The op's word: a mean that is renormalised starts from full rows.
        self.over = "columns" if over == "columns" else "visible"

    def how(self, record: Record, module: nn.Module, rows: QueryRows, how: dict) -> dict:
        """The options of the op in this layer."""
        lse = record.normaliser if self.over == "visible" else None
        how = {**how, "allowed": self.at.allowed, "over": self.over, "lse": rows_of_lse(rows, lse)}
        if self.head_weight is not None:
            how["head_weight"] = self.head_weight[module.__dict__[LAYER]]
        return how

    def takes(self, record: Record, module: nn.Module) -> bool:
        """Whether this layer counts.

        Raises:
            ValueError: reentrant checkpointing, which runs layers without a graph.
        """
        if self.layers is not None and module.__dict__[LAYER] not in self.layers:
            return False
        if record.grad_enabled and not torch.is_grad_enabled():
            fail(
                "gradient_checkpointing_kwargs",
                "use_reentrant=False: reentrant checkpointing drops the gradient of attention maps",
                "use_reentrant=True",
            )
        return True


class MapLoss(_Reading):
    """The divergence of the map rows, summed over the layers that see a target column (K3)."""

    def __init__(self, at: MapRows, target: Tensor, klal: Klal, head_weight: Tensor | None) -> None:
        super().__init__(at, klal.layers, klal.over, head_weight)
        self.target, self.klal = target, klal  # [N, C]
        self.total = torch.zeros(len(target), device=target.device)  # [N]
        self.seen = torch.zeros(len(target), device=target.device)  # [N] layers

    def read(self, record: Record, module: nn.Module, q, k, v, window, how: dict) -> None:
        """Add one layer."""
        if not self.takes(record, module):
            return
        rows, klal = self.at.rows.at(window), self.klal
        how = self.how(record, module, rows, how)
        own = self.at.own(window)
        if klal.from_maps:
            attention = attention_map(rows.take(q), k, rows, self.at.columns, **how)
            loss = map_loss(attention, self.target, own, klal)
        else:
            loss = attention_kl(
                rows.take(q), k, self.target, rows, self.at.columns, heads=klal.heads, **how
            )
        if record.open:
            self.seen = self.seen + ((self.target > 0) & own).any(1)
            self.total = self.total + loss

    def rows(self) -> Tensor:
        """[N]: each row's mean over the layers that see its target."""
        return self.total / self.seen.clamp(min=1)


class MapSum(_Reading):
    """The rows' attention map, summed over layers (K2); head weights sum to 1 over all of them."""

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None,
        over: str,
        head_weight: Tensor | None = None,
    ) -> None:
        super().__init__(at, layers, over, head_weight)
        shape = len(at.rows.position), at.columns.shape[1]
        self.total = torch.zeros(shape, device=at.columns.device)
        self.seen = torch.zeros(shape, device=at.columns.device)  # layers in which a column is own

    def read(self, record: Record, module: nn.Module, q, k, v, window, how: dict) -> None:
        """Add one layer."""
        if not self.takes(record, module):
            return
        rows = self.at.rows.at(window)
        how = self.how(record, module, rows, how)
        attention = attention_map(rows.take(q), k, rows, self.at.columns, **how)
        if record.open:
            self.total = self.total + attention
            self.seen = self.seen + self.at.own(window)

    def mean(self) -> Tensor:
        """[N, C]: over the layers in which the row sees anything of its image."""
        if self.head_weight is not None:
            return self.total
        layers = self.seen.amax(1, keepdim=True) if self.seen.shape[1] else self.seen
        return self.total / layers.clamp(min=1)


def map_loss(attention: Tensor, target: Tensor, own: Tensor, klal: Klal) -> Tensor:
    """[N]: the divergence of maps [N, C]; rows that see no target column: 0."""
    return map_divergence(
        target.masked_fill(~own, 0.0),
        attention,
        kind=klal.divergence,
        valid=own,
        renormalise=klal.over == "renormalised" or (klal.over == "columns" and klal.average_layers),
    )


@dataclass
class Readings:
    """The readings of one forward; None where no term or no row asks."""

    kl: MapLoss | None = None
    kl_map: MapSum | None = None
    margin_map: MapSum | None = None
    phrase_map: MapSum | None = None
    maps: MapMean | None = None

    def all(self) -> list:
        """Those that are there."""
        return [reading for reading in vars(self).values() if reading is not None]


def readings_of(call: Call) -> Readings:
    """The readings that the terms and the mode of a call ask for."""
    s, terms, found = call.s, call.terms, Readings()
    if s.map_columns.shape[1] == 0:
        return found
    columns = s.map_columns.int()
    if s.map_position.shape[1]:
        at = map_rows_of(call)
        klal, margins = terms.klal, terms.margins
        if klal is not None and klal.average_layers:
            found.kl_map = MapSum(at, klal.layers, klal.over, _head_weight(call, klal))
        elif klal is not None:
            found.kl = MapLoss(at, map_target(call), klal, _head_weight(call, klal))
        if margins is not None and margins.maps == "attention":
            found.margin_map = MapSum(at, margins.layers, "columns")
        if "maps" in call.records:
            found.maps = MapMean(at.rows, columns, at.allowed)
    hist = terms.hist
    if hist is not None and hist.maps == "attention" and s.phrase_composite.shape[1]:
        own_rows = torch.where(s.phrase_position >= 0, s.phrase_position + 1, -1)
        at = MapRows(call.rows(own_rows), columns)
        found.phrase_map = MapSum(at, hist.layers, hist.over)
    return found


def map_rows_of(call: Call) -> MapRows:
    """KLAL's rows and the columns of their own image."""
    s = call.s
    image = s.image.gather(1, s.map_columns.clamp(min=0).long())  # [B, C]
    own = (image[:, None] == s.map_image[..., None]) & (s.map_columns >= 0)[:, None]
    return MapRows(call.rows(s.map_position), s.map_columns.int(), map_sets(s), own.flatten(0, 1))


def map_target(call: Call) -> Tensor:
    """[N, C] fp32 >= 0: the map rows' target, of any scale."""
    return call.s.map_target.flatten(0, 1).clamp(min=0).float()


def _head_weight(call: Call, klal: Klal) -> Tensor | None:
    """[L, H]: the softmax of the learned logits over what the map sums over."""
    if klal.head_weight == "uniform":
        return None
    logits = getattr(call.model, HEAD_WEIGHT).float()
    if not klal.average_layers:
        return logits.softmax(-1)
    counted = range(len(logits)) if klal.layers is None else klal.layers
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[list(counted)] = True
    return logits.masked_fill(~kept, -torch.inf).flatten().softmax(0).view_as(logits)
