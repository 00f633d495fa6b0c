"""GUI-AIMA's maps: each row has head weights of its own, from the tokens between image and row.

Which of these tokens count is known only when the last layer has run, so what maps are made of (the
keys of each layer, and the rows' queries) is kept until then, and nothing runs twice. Under
checkpointing these are graph tensors of the first forward, like any sum that a reading keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from groundkern import side_attention
from groundkern.checks import fail, require
from groundkern.head_weights import (
    likeness,
    pattern_head_weight,
    sink_head_weight,
    sink_queries,
)
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.layers import text_attention, text_decoder
from groundkern.hf.model.map_readings import MapRows, MapSum
from groundkern.hf.model.readings import Readings, map_rows_of
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import Rows, take_rows
from groundkern.hf.objectives import Klal
from groundkern.selection import KeySets


class SinkQueries:
    """The query tokens of each map row: their queries in every layer, and how like the row's image
    their hidden states are.

    Args:
        request: of a batch with `query_position`.
        at: the map rows.
        layers: those that count.
    """

    uses_lse = alike = False

    def __init__(self, request: Request, at: MapRows, layers: tuple[int, ...]) -> None:
        self.position = request.batch.query_position  # [B, Rm, Q]
        batch, self.map_rows, self.most = self.position.shape
        if self.most == 0:
            wanted = "the tokens between image and row (the collator's `query_tokens`)"
            fail("gk_query_position", wanted, "none, which klal.head_weight needs")
        self.layers = layers
        self.rows_of: Callable[[Tensor], Rows] = request.rows
        self.rows = request.rows(self.position.flatten(1))
        self.columns, self.own = at.columns, at.own(None).view(batch, self.map_rows, -1)
        self.valid = (self.position >= 0).flatten(0, 1)  # [N, Q]
        self.likeness = torch.zeros(self.valid.shape, device=self.valid.device)
        self.seen = 0  # layers

    def rows_in(self, number: int) -> Rows | None:
        """The query tokens, in the layers that count."""
        return self.rows if number in self.layers else None

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Nothing: `SinkMaps` keeps what the layers have of them."""

    @torch.no_grad()
    def see(self, hidden: Tensor) -> None:
        """Add the cosines of one layer's output.

        Args:
            hidden: [B, S, D], of the main tokens.
        """
        self.seen += 1
        queries = take_rows(hidden, self.position.flatten(1)).unflatten(1, self.position.shape[1:])
        found = likeness(queries, take_rows(hidden, self.columns), self.own)
        self.likeness = self.likeness + found.flatten(0, 1)

    def chosen(self, klal: Klal) -> tuple[Tensor, Tensor, Rows]:
        """Which query tokens make the head weights: [N, K] indices, which exist, and their rows."""
        if klal.head_weight == "pattern":
            index = torch.arange(self.most, device=self.valid.device).expand(self.valid.shape)
            return index, self.valid, self.rows
        index, valid = sink_queries(self.likeness, self.valid, klal.sink_queries)
        at = self.position.flatten(0, 1).gather(1, index).view(-1, self.map_rows * index.shape[1])
        return index, valid, self.rows_of(at)


class SinkMaps(MapSum):
    """The map rows' attention, summed over layers and heads with weights of each row (G2).

    Args:
        at: the rows.
        klal: its `head_weight` is "sink" or "pattern".
        queries: the rows' query tokens.
    """

    def __init__(self, at: MapRows, klal: Klal, queries: SinkQueries) -> None:
        super().__init__(at, klal.layers, klal.over)
        self.alike, self.klal, self.queries = False, klal, queries
        self.kept: list[Layer] = []

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Keep the rows' queries and the keys of one layer, if it counts."""
        if self.rows_in(layer.number) is None:
            return
        run.refuse_lost_graph("attention maps")
        if not run.finished:
            self.windows[layer.window] += 1
            self.kept.append(layer._replace(q=None, v=layer.k, out=None))

    def weights(self) -> Tensor:
        """[N, L, H] over the layers that count, differentiable (G1)."""
        index, valid, rows = self.queries.chosen(self.klal)
        mass = torch.stack([self._mass(layer, index, valid, rows) for layer in self.kept], 2)
        if self.klal.head_weight == "pattern":
            return pattern_head_weight(mass, self.queries.likeness, self.queries.valid)
        return sink_head_weight(mass)

    def mean(self) -> Tensor:
        """[N, C]: of weights that sum to 1 over layers and heads."""
        weights = self.weights()
        total = self.total
        for layer, weight in zip(self.kept, weights.unbind(1), strict=True):
            total = total + self.map(layer, weight)
        return total

    def _mass(self, layer: Layer, index: Tensor, valid: Tensor, rows: Rows) -> Tensor:
        """[N, K, H]: the mass of chosen query tokens on the image of their map row (G1)."""
        (count, most), own = index.shape, self.queries
        first = torch.arange(count, device=index.device)[:, None] * own.most
        q = layer.queries(own.rows)[(index + first).flatten()]  # [N K, H, D]
        allowed = self.at.allowed
        sets = torch.arange(count, dtype=torch.int32, device=index.device)
        allowed = KeySets(allowed.bits, sets.repeat_interleave(most), allowed.keys)
        at, options = rows.at(layer.window), layer.options
        on_image = side_attention(q, layer.k, layer.k, at, allowed=allowed, **options).lse
        whole = side_attention(q, layer.k, layer.k, at, **options).lse
        if layer.sinks is not None:
            whole = torch.logaddexp(whole, layer.sinks.to(whole.dtype))
        there = valid.flatten()[:, None]
        mass = (on_image.masked_fill(~there, -torch.inf) - whole.masked_fill(~there, 0.0)).exp()
        return mass.view(count, most, -1)


def add_sink_maps(request: Request, readings: Readings) -> SinkQueries | None:
    """Add KLAL's readings with head weights of each row, if it has such weights.

    Args:
        request: what is computed.
        readings: of the request, which gain `kl_map` and `queries`.

    Returns:
        The query tokens, which have yet to see the layers' outputs; None: there are none.

    Raises:
        ValueError: a batch without query tokens.
    """
    klal, batch = request.terms.klal, request.batch
    rows = batch.map_columns.shape[1] and batch.map_position.shape[1]
    if klal is None or not klal.by_queries or not rows:
        return None
    at = map_rows_of(request)
    queries = SinkQueries(request, at, klal.layers or tuple(text_attention(request.model)))
    readings.queries, readings.kl_map = queries, SinkMaps(at, klal, queries)
    return queries


@contextmanager
def watched(model: nn.Module, queries: SinkQueries | None, length: int) -> Iterator[None]:
    """Let query tokens see the output of every layer but the last that runs within the block.

    The last one's is the body's own, behind the final norm (`see_last`).

    Args:
        model: the attached model, without wrappers.
        queries: None: nothing is watched.
        length: S, the main tokens; what follows are side tokens.
    """
    hooks = []
    try:
        for number in [] if queries is None else range(len(text_decoder(model).layers) - 1):
            if queries.rows_in(number) is not None:
                hook = _see(queries, length)
                hooks.append(text_decoder(model).layers[number].register_forward_hook(hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _see(queries: SinkQueries, length: int) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        queries.see(hidden.detach()[:, :length])

    return hook


def see_last(model: nn.Module, queries: SinkQueries, hidden: Tensor) -> None:
    """Let query tokens see the body's output, and check that they saw all layers that count.

    Args:
        model: the attached model, without wrappers.
        queries: those of `watched`.
        hidden: [B, S, D], last hidden states.

    Raises:
        ValueError: layers whose output did not come by.
    """
    if queries.rows_in(len(text_decoder(model).layers) - 1) is not None:
        queries.see(hidden.detach())
    got, wanted = queries.seen, len(queries.layers)
    require(got == wanted, "klal.head_weight", f"the outputs of {wanted} decoder layers", got)
