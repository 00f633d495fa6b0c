"""Attention maps that are read in every layer: running sums with a gradient, and recordings.

The attention function (attention.py) calls `read` of each reading, layer by layer. Sums are plain
tensors: a layer that checkpointing recomputes reads the same maps and leaves the sums alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from groundkern import attention_kl, attention_map, parallel
from groundkern.hf.model.attention import BodyRun, Layer, Reading
from groundkern.hf.model.attribution import SavedAttention
from groundkern.hf.model.basic import basic_depth
from groundkern.hf.model.columns import SplitColumns
from groundkern.hf.model.gradcam import SavedLayers, gradcam_terms
from groundkern.hf.model.head_weight import head_weight_of
from groundkern.hf.model.patch_weight import PatchWeight
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import Rows, Window, map_sets
from groundkern.hf.objectives import Klal
from groundkern.losses import map_divergence
from groundkern.selection import KeySets, QueryRows, Selection


@dataclass(frozen=True)
class MapRows:
    """Rows, the key columns of their maps, and which of these are a row's own.

    Args:
        rows: N = B x R rows.
        columns: int32 [B, C].
        allowed: the keys of each row's own image; None: every column is.
        image: bool [N, C], the columns of each row's own image; None: every column is.
        split: those that this rank holds; None: all.
    """

    rows: Rows
    columns: Tensor
    allowed: KeySets | None = None
    image: Tensor | None = None
    split: SplitColumns | None = None
    _own: dict[Window, Tensor] = field(default_factory=dict)

    def own(self, window: Window) -> Tensor:
        """bool [N, C]: the columns of its own image that a row sees; made once for each window."""
        if window not in self._own:
            self._own[window] = self._make_own(self.rows.at(window))
        return self._own[window]

    def _make_own(self, rows: QueryRows) -> Tensor:
        seen = Selection.of(rows, None, self.columns).own_columns()
        return seen if self.image is None else seen & self.image


class _MapReading:
    """A reading of the rows' attention maps.

    Args:
        at: the rows.
        layers: those that count; None: all.
        over: as in `Klal`.
        head_weight: [L, H]; None: the head mean.
    """

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None = None,
        over: str = "columns",
        head_weight: Tensor | None = None,
    ) -> None:
        self.at, self.layers = at, layers
        self.head_weight = None if head_weight is None else head_weight.unbind()  # [H] of each
        # As the op names it: a mean that is renormalised later starts from full rows.
        self.over = "columns" if over == "columns" else "visible"
        self.uses_lse = self.over == "visible"
        self.windows: Counter[Window] = Counter()  # of the layers that counted so far

    def rows_in(self, number: int) -> Rows | None:
        """The rows, in the layers that count."""
        return self.at.rows if self.layers is None or number in self.layers else None

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer, if it counts; it must have a graph then."""
        if self.rows_in(layer.number) is None:
            return
        run.refuse_lost_graph("attention maps")
        found = self.of(layer)
        if not run.finished:
            self.windows[layer.window] += 1
            self.add(found)

    def options(self, layer: Layer) -> dict:
        """The options of the op in this layer."""
        head_weight = None if self.head_weight is None else self.head_weight[layer.number]
        if self.at.split is not None:
            options = {**layer.options, "allowed": self.at.split.allowed, "over": self.over}
            return options | {"head_weight": head_weight}
        lse = None
        if self.uses_lse:
            lse = layer.normaliser(self.at.rows)
            if lse is None and not layer.masked:
                lse = layer.lse.get(self.at.rows)
        options = {**layer.options, "allowed": self.at.allowed, "over": self.over, "lse": lse}
        return options | {"head_weight": head_weight}

    def map(self, layer: Layer) -> Tensor:
        """[N, C] of one layer (K1), (K2); of this rank's columns [N, C_r]."""
        at, q = self.at, layer.queries(self.at.rows)
        options = self.options(layer)
        if at.split is not None:
            rows = at.rows.sharded(layer.window)
            return parallel.attention_map(q, layer.k, rows, at.split.columns, **options)
        return attention_map(q, layer.k, at.rows.at(layer.window), at.columns, **options)

    def all_columns(self, maps: Tensor) -> Tensor:
        """[N, C] of what `map` returned."""
        return maps if self.at.split is None else self.at.split.all(maps)


class MapLoss(_MapReading):
    """The divergence of the map rows, summed over the layers that see a target column (K3)."""

    def __init__(self, at: MapRows, target: Tensor, klal: Klal, head_weight: Tensor | None) -> None:
        super().__init__(at, klal.layers, klal.over, head_weight)
        self.target, self.klal = target, klal  # [N, C]
        self.target_here = target if at.split is None else at.split.take(target)
        self.losses = [torch.zeros(len(target), device=target.device)]  # [N] of each layer

    def of(self, layer: Layer) -> Tensor:
        """[N] of one layer; of a rank's part, what all ranks have adds up to it."""
        at, split = self.at, self.at.split
        if self.klal.from_maps:
            maps = self.all_columns(self.map(layer))
            rows = map_loss(maps, self.target, at.own(layer.window), self.klal)
            return rows if split is None else rows / split.shard.ranks
        q, options = layer.queries(at.rows), {**self.options(layer), "heads": self.klal.heads}
        if split is None:
            rows = at.rows.at(layer.window)
            return attention_kl(q, layer.k, self.target, rows, at.columns, **options)
        rows = at.rows.sharded(layer.window)
        own = parallel.attention_kl(
            q, layer.k, self.target_here, rows, split.columns, **options
        )  # [N_r]
        return own.new_zeros(len(rows)).index_copy(0, rows.own, own)

    def add(self, loss: Tensor) -> None:
        """Add [N] of one layer."""
        self.losses.append(loss)

    def rows(self) -> Tensor:
        """[N]: each row's mean over the layers that see its target."""
        seen = torch.zeros_like(self.losses[0])  # layers
        for window, layers in self.windows.items():
            seen += layers * ((self.target > 0) & self.at.own(window)).any(1)
        return torch.stack(self.losses).sum(0) / seen.clamp(min=1)


class MapSum(_MapReading):
    """The rows' attention map, summed over layers (K2); head weights sum to 1 over all of them."""

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None,
        over: str,
        head_weight: Tensor | None = None,
    ) -> None:
        super().__init__(at, layers, over, head_weight)
        columns = at.columns if at.split is None else at.split.columns
        shape = len(at.rows.position), columns.shape[1]
        self.total = torch.zeros(shape, device=columns.device)  # of this rank's columns

    def of(self, layer: Layer) -> Tensor:
        """[N, C] of one layer."""
        return self.map(layer)

    def add(self, attention: Tensor) -> None:
        """Add [N, C] of one layer."""
        self.total = self.total + attention

    @property
    def seen(self) -> Tensor:
        """[N, C]: the layers in which a column is own."""
        shape = len(self.total), self.at.columns.shape[1]
        seen = torch.zeros(shape, device=self.total.device)
        for window, layers in self.windows.items():
            seen += layers * self.at.own(window)
        return seen

    def mean(self) -> Tensor:
        """[N, C]: over the layers in which the row sees anything of its image."""
        total = self.all_columns(self.total)
        if self.head_weight is not None:
            return total
        seen = self.seen
        layers = seen.amax(1, keepdim=True) if seen.shape[1] else seen
        return total / layers.clamp(min=1)


class RecordedMaps(_MapReading):
    """The map rows' attention in every layer, without a gradient."""

    def __init__(self, at: MapRows) -> None:
        super().__init__(at)
        self.maps: list[Tensor] = []  # [N, C] each

    def rows_in(self, number: int) -> None:
        """None: it takes them itself, without a gradient."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer."""
        if not run.finished:
            with torch.no_grad():
                self.maps.append(self.all_columns(self.map(layer)))


def map_loss(attention: Tensor, target: Tensor, own: Tensor, klal: Klal) -> Tensor:
    """[N]: the divergence of maps [N, C]; 0 for a row that sees no target column."""
    return map_divergence(
        target.masked_fill(~own, 0.0),
        attention,
        kind=klal.divergence,
        valid=own,
        renormalise=klal.over == "renormalised" or (klal.over == "columns" and klal.average_layers),
    )


@dataclass
class Readings:
    """The readings of one forward; None if no term or no row uses one."""

    kl: MapLoss | None = None
    kl_map: MapSum | None = None
    margin_map: MapSum | None = None
    phrase_map: MapSum | None = None
    recorded: RecordedMaps | None = None
    saved: SavedAttention | None = None
    explained: SavedLayers | None = None
    patches: PatchWeight | None = None

    def all(self) -> list[Reading]:
        """Those that are there."""
        found = (getattr(self, field.name) for field in fields(self))
        return [reading for reading in found if reading is not None]


def readings_of(request: Request) -> Readings:
    """The readings that the terms and the recordings of a request use."""
    batch, terms, shard, found = request.batch, request.terms, request.shard, Readings()
    if request.records & {"contributions", "gradcam"} and request.recorded_position.shape[1]:
        found.saved = SavedAttention(request.rows(request.recorded_position))
    if gradcam_terms(request) and not request.side_tokens:
        found.explained = SavedLayers()
    if terms.basic is not None and terms.basic.patches == "attention":
        found.patches = PatchWeight(request, basic_depth(request.model, terms.basic))
    if batch.map_columns.shape[1] == 0:
        return found
    if batch.map_position.shape[1]:
        at, klal, margins = map_rows_of(request), terms.klal, terms.margins
        if klal is not None:
            weight = head_weight_of(request.model, klal)
            if klal.average_layers:
                found.kl_map = MapSum(at, klal.layers, klal.over, weight)
            else:
                found.kl = MapLoss(at, map_target(request), klal, weight)
        if margins is not None and margins.maps == "attention":
            found.margin_map = MapSum(at, margins.layers, "columns")
        if "maps" in request.records:
            found.recorded = RecordedMaps(at)
    hist = terms.hist
    if hist is not None and hist.maps == "attention" and batch.phrase_composite.shape[1]:
        own_rows = torch.where(batch.phrase_position >= 0, batch.phrase_position + 1, -1)
        rows, columns = request.rows(own_rows), batch.map_columns.int()
        split = None if shard is None else SplitColumns.of(shard, rows, columns, None)
        at = MapRows(rows, columns, split=split)
        found.phrase_map = MapSum(at, hist.layers, hist.over)
    return found


def map_rows_of(request: Request) -> MapRows:
    """KLAL's rows and the columns of their own image."""
    batch, columns = request.batch, request.batch.map_columns
    image = batch.image.gather(1, columns.clamp(min=0).long())  # [B, C]
    own = (image[:, None] == batch.map_image[..., None]) & (columns >= 0)[:, None]
    rows, columns, shard = request.rows(batch.map_position), columns.int(), request.shard
    own = own.flatten(0, 1)
    if shard is None:
        return MapRows(rows, columns, map_sets(batch), own)
    split = SplitColumns.of(shard, rows, columns, map_sets(batch, shard))
    return MapRows(rows, columns, None, own, split)


def map_target(request: Request) -> Tensor:
    """[N, C] fp32 >= 0: the map rows' target, of any scale."""
    return request.batch.map_target.flatten(0, 1).float().clamp_(min=0)
