"""Attention maps that are read in every layer: running sums with a gradient, and recordings.

The attention function (attention.py) calls `read` of each, layer by layer, or asks before the
layer's main pass. Sums are plain tensors: a layer that checkpointing recomputes reads the same maps
and leaves the sums alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groundkern import asked, attention_divergence, parallel
from groundkern.asked import Asked, Repeated
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.chosen_heads import take_heads
from groundkern.hf.model.columns import SplitColumns
from groundkern.hf.model.layer import Layer, Question
from groundkern.hf.model.rows import Rows, Window
from groundkern.hf.objectives import Klal
from groundkern.losses import map_divergence
from groundkern.normaliser import log_sum_exp
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


class MapReading:
    """A reading of the rows' attention maps.

    Args:
        at: the rows.
        layers: those that count; None: all.
        over: as in `Klal`.
        head_weight: [L, H]; None: the head mean.
        chosen: the heads of each layer that count; None: all.
    """

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None = None,
        over: str = "columns",
        head_weight: Tensor | None = None,
        chosen: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.at, self.layers, self.chosen = at, layers, chosen
        self.head_weight = None if head_weight is None else head_weight.unbind()  # [H] of each
        # As the op names it: a mean that is renormalised later starts from full rows.
        self.over = "columns" if over == "columns" else "visible"
        self.uses_lse = self.over == "visible"
        self.alike = False
        self.repeated = Repeated()
        self.windows: Counter[Window] = Counter()  # of the layers that counted so far

    def rows_in(self, number: int) -> Rows | None:
        """The rows, in the layers that count."""
        return self.at.rows if self.layers is None or number in self.layers else None

    def read(self, run: BodyRun, layer: Layer) -> Question | None:
        """Add one layer, if it counts; it must have a graph then."""
        if self.rows_in(layer.number) is None:
            return None
        run.refuse_lost_graph("attention maps")
        if self.chosen is not None:
            layer = layer.at_heads(self.at.rows, self.chosen[layer.number])
        take = partial(self.take, run.finished, layer.number, layer.window)
        found = self.of(layer)
        if isinstance(found, Asked):
            return Question(found, take)
        take(found)
        return None

    @property
    def layers_alike(self) -> bool:
        """Whether neither heads, their weights nor a split make one layer differ from another."""
        return self.head_weight is None and self.chosen is None and self.at.split is None

    def take(self, finished: bool, number: int, window: Window, found: Any) -> None:
        """Add what was found of one layer."""
        if not finished:
            self.windows[window] += self.share(number)
            self.add(found, number)

    def ask(self, layer: Layer) -> Asked:
        """As `Reading` has it."""
        return self.of(layer)

    def share(self, number: int) -> int:
        """How much a layer counts in the mean over layers."""
        return 1

    def options(self, layer: Layer) -> dict:
        """The options of the op in this layer."""
        head_weight = None if self.head_weight is None else self.head_weight[layer.number]
        if head_weight is not None and self.chosen is not None:
            head_weight = take_heads(head_weight[None], self.chosen[layer.number])[0]
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

    def map(self, layer: Layer, weight: Tensor | None = None) -> Tensor:
        """[N, C] of one layer (K1), (K2); of this rank's columns [N, C_r].

        Args:
            layer: the layer.
            weight: [N, H], of the heads of each row; None: the reading's own.
        """
        found = self.ask_map(layer, weight)
        if not isinstance(found, Asked):
            return found
        ((found,),) = asked.run([found])
        return found

    def ask_map(self, layer: Layer, weight: Tensor | None = None) -> Asked | Tensor:
        """The same, still to be run; of a rank's columns it has been."""
        at, q = self.at, layer.queries(self.at.rows)
        options = self.options(layer)
        if weight is not None:
            options["head_weight"] = weight
        if at.split is not None:
            rows = at.rows.sharded(layer.window)
            return parallel.attention_map(q, layer.k, rows, at.split.columns, **options)

        def make() -> Asked:
            rows = at.rows.at(layer.window)
            return asked.attention_map(q, layer.k, rows, at.columns, **options)

        return self.asked_again(layer, q, options, make)

    def asked_again(
        self, layer: Layer, q: Tensor, options: dict, make: Callable[[], Asked]
    ) -> Asked:
        """What `make` asks for; without head weights, by what was found in the layers before."""
        if options["head_weight"] is not None:
            return make()
        lse = options["lse"]
        trained = lse is not None and lse.requires_grad  # which is another call
        tensors = {"q": q, "k": layer.k, "lse": lse}
        return self.repeated((layer.window, layer.options, trained), tensors, make)

    def all_columns(self, maps: Tensor) -> Tensor:
        """[N, C] of what `map` returned."""
        return maps if self.at.split is None else self.at.split.all(maps)


class MapLoss(MapReading):
    """The divergence of the map rows, summed over the layers that see a target column (K3)."""

    def __init__(self, at: MapRows, target: Tensor, klal: Klal, head_weight: Tensor | None) -> None:
        super().__init__(at, klal.counted_layers, klal.over, head_weight, klal.heads_by_layer)
        self.target, self.klal = target, klal  # [N, C]
        self.alike = self.layers_alike and not (klal.of_mass or klal.from_maps)
        self.target_here = target if at.split is None else at.split.take(target)
        self.losses = [torch.zeros(len(target), device=target.device)]  # [N] of each layer

    def of(self, layer: Layer) -> Tensor | Asked:
        """[N] of one layer; of a rank's part, what all ranks have adds up to it."""
        at, split, klal = self.at, self.at.split, self.klal
        if klal.of_mass:
            maps = self.all_columns(self.map(layer))
            rows = map_loss(maps, self.target, at.own(layer.window), klal)
            return rows if split is None else rows / split.shard.ranks
        q, options = layer.queries(at.rows), self.options(layer)
        if klal.from_maps:  # [N, C] is made in both passes and kept in neither
            options |= {"kind": klal.divergence, "over": klal.over}
            of_rows, of_shard = attention_divergence, parallel.attention_divergence
        else:
            options["heads"] = klal.heads
            of_rows, of_shard = asked.attention_kl, parallel.attention_kl
        if split is None:

            def make() -> Tensor | Asked:
                rows = at.rows.at(layer.window)
                return of_rows(q, layer.k, self.target, rows, at.columns, **options)

            return make() if klal.from_maps else self.asked_again(layer, q, options, make)
        rows = at.rows.sharded(layer.window)
        own = of_shard(q, layer.k, self.target_here, rows, split.columns, **options)  # [N_r]
        return own.new_zeros(len(rows)).index_copy(0, rows.own, own)

    def add(self, loss: Tensor, number: int) -> None:
        """Add [N] of one layer."""
        self.losses.append(loss)

    def rows(self) -> Tensor:
        """[N]: each row's mean over the layers that see its target."""
        seen = torch.zeros_like(self.losses[0])  # layers
        for window, layers in self.windows.items():
            seen += layers * ((self.target > 0) & self.at.own(window)).any(1)
        return torch.stack(self.losses).sum(0) / seen.clamp(min=1)


class MapSum(MapReading):
    """The rows' attention map, summed over layers (K2); head weights sum to 1 over all of them.

    Of chosen heads it is the sum over these, of all layers together (K6).
    """

    def __init__(
        self,
        at: MapRows,
        layers: tuple[int, ...] | None,
        over: str,
        head_weight: Tensor | None = None,
        chosen: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(at, layers, over, head_weight, chosen)
        self.alike = self.layers_alike
        columns = at.columns if at.split is None else at.split.columns
        shape = len(at.rows.position), columns.shape[1]
        self.total = torch.zeros(shape, device=columns.device)  # of this rank's columns

    def of(self, layer: Layer) -> Tensor | Asked:
        """[N, C] of one layer."""
        return self.ask_map(layer)

    def share(self, number: int) -> int:
        """As many as its chosen heads: each of these counts alike."""
        return 1 if self.chosen is None else len(self.chosen[number])

    def add(self, attention: Tensor, number: int) -> None:
        """Add [N, C] of one layer."""
        share = 1 if self.head_weight is not None else self.share(number)
        self.total = self.total + (attention if share == 1 else attention * share)

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


class PickedSum(MapSum):
    """The mean map of the heads, of all layers, with most of their attention on a row's image (K6).

    Which these are is known behind the last layer: the rows' queries and the keys of every layer
    stay until then, as those of a cache for generation do.
    """

    def __init__(self, at: MapRows, layers: tuple[int, ...] | None, over: str, count: int) -> None:
        super().__init__(at, layers, over)
        self.alike, self.count = False, count
        self.saved: list[Layer] = []
        self.mass: list[Tensor] = []  # [N, H] of each

    def of(self, layer: Layer) -> Layer:
        """The layer, without what is not read again."""
        v = layer.v if layer.sinks is not None else None
        taken = {self.at.rows: layer.queries(self.at.rows)}
        return layer._replace(module=None, q=None, v=v, out=None, taken=taken)

    def add(self, layer: Layer, number: int) -> None:
        """Save one layer, and how much of each head's attention is on the image."""
        self.saved.append(layer)
        with torch.no_grad():
            at, q, options = self.at, layer.queries(self.at.rows), self.options(layer)
            given, lse = (q, layer.k, at.rows.at(layer.window), at.columns), options["lse"]
            own = log_sum_exp(*given, "columns", at.allowed, layer.options)
            if lse is None:
                lse = log_sum_exp(*given, "visible", None, layer.options)
            self.mass.append(torch.where(own.isinf(), 0.0, (own - lse).exp()))

    def mean(self) -> Tensor:
        """[N, C]: over the picked heads of each row."""
        mass = torch.cat(self.mass, 1)  # [N, L H]
        picked = torch.zeros_like(mass).scatter_(1, mass.topk(self.count, 1).indices, 1.0)
        parts = (picked / self.count).split([mass.shape[1] for mass in self.mass], 1)
        weights = zip(self.saved, parts, strict=True)
        self.head_weight = {layer.number: weight for layer, weight in weights}  # [N, H] each
        return sum(map(self.map, self.saved), self.total)


class RecordedMaps(MapReading):
    """The map rows' attention in every layer, without a gradient."""

    def __init__(self, at: MapRows, over: str = "columns") -> None:
        super().__init__(at, over=over)
        self.maps: list[Tensor] = []  # [N, C] each

    def rows_in(self, number: int) -> None:
        """None: it takes them itself, without a gradient."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer."""
        if not run.finished:
            with torch.no_grad():
                self.maps.append(self.all_columns(self.map(layer)))


class RecordedHeads(MapReading):
    """The map rows' attention of every head in every layer, over all visible keys, without a
    gradient: head by head, each at the cost of the map of one head."""

    def __init__(self, at: MapRows) -> None:
        super().__init__(at, over="visible")
        self.uses_lse = False  # it takes its rows itself
        self.maps: list[Tensor] = []  # [N, H, C] each

    def rows_in(self, number: int) -> None:
        """None: it takes them itself, without a gradient."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer."""
        if run.finished:
            return
        with torch.no_grad():
            heads, rows = range(layer.q.shape[1]), self.at.rows
            whole = layer.at_heads(rows, heads)  # with the rows' queries, taken once
            maps = [self.all_columns(self.map(whole.at_heads(rows, (h,)))) for h in heads]
            self.maps.append(torch.stack(maps, 1))


def map_loss(attention: Tensor, target: Tensor, own: Tensor, klal: Klal) -> Tensor:
    """[N]: the divergence of maps [N, C]; 0 for a row that sees no target column."""
    return map_divergence(
        target.masked_fill(~own, 0.0),
        attention,
        kind=klal.divergence,
        valid=own,
        renormalise=klal.over == "renormalised" or (klal.over == "columns" and klal.average_layers),
    )
