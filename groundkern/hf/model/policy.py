"""Attention of rows over everything that they see, as a policy: against references, and recorded.

A row's own position is left out by bits, one set for each row, made once for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from groundkern import AttentionReference, attention_divergence
from groundkern.checks import require
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.map_readings import MapReading, MapRows
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import Rows, Window
from groundkern.hf.objectives import AttentionPolicy, Chosen
from groundkern.selection import KeySets

References = Mapping[int, Tensor | AttentionReference]
"""By the number of a layer: maps [N, S] of any scale, or the queries and keys that make them."""


def chosen_layers(model: nn.Module, layers: Chosen) -> tuple[int, ...]:
    """The numbers of the layers that `AttentionPolicy.layers` means.

    Args:
        model: a transformers model without wrappers.
        layers: "last", "all" or numbers.

    Returns:
        Layers of softmax attention, ascending.
    """
    numbers = tuple(text_attention(model))
    if layers == "last":
        return numbers[-1:]
    return numbers if layers == "all" else tuple(layers)


def rows_over_all(request: Request, position: Tensor, *, leave_out_self: bool) -> MapRows:
    """Rows whose map is over all positions of their sequence (R1).

    Args:
        request: of the batch.
        position: [B, R], padded with -1.
        leave_out_self: without the row's own position.
    """
    sequences, keys = request.input_ids.shape
    rows = request.rows(position)
    columns = torch.arange(keys, dtype=torch.int32, device=position.device)
    allowed = KeySets.all_but(rows.position, keys) if leave_out_self else None
    return MapRows(rows, columns.repeat(sequences, 1), allowed)


class AgainstReferences(MapReading):
    """The divergence of the rows' attention from references, summed over layers (R2), (R3).

    Args:
        at: the rows.
        references: of each layer that counts.
        kind: of `attention_divergence`.
        windows: how far back the references see, of those that must be the layers' own.
    """

    def __init__(
        self,
        at: MapRows,
        references: References,
        kind: str,
        windows: Mapping[int, Window] | None = None,
    ) -> None:
        super().__init__(at, tuple(references), "renormalised")
        self.references, self.kind, self.seen_by_references = references, kind, windows or {}
        self.total = torch.zeros(len(at.rows.position), device=at.columns.device)  # [N]

    def of(self, layer: Layer) -> Tensor:
        """[N] of one layer."""
        at, number = self.at, layer.number
        window = self.seen_by_references.get(number, layer.window)
        wanted = "a layer of the teacher that sees as far back as the student's"
        require(window == layer.window, "teacher_layers", wanted, f"{window} of {layer.window}")
        return attention_divergence(
            layer.queries(at.rows),
            layer.k,
            self.references[number],
            at.rows.at(layer.window),
            at.columns,
            kind=self.kind,
            **{**self.options(layer), "over": "renormalised"},
        )

    def add(self, divergence: Tensor, number: int) -> None:
        """Add [N] of one layer."""
        self.total = self.total + divergence

    def mean(self) -> Tensor:
        """[N]: over the layers."""
        return self.total / len(self.references)


class RecordedPolicy(MapReading):
    """The rows' head mean of attention in some layers, without a gradient and not renormalised."""

    def __init__(self, at: MapRows, layers: tuple[int, ...]) -> None:
        super().__init__(at, layers, "visible")
        self.maps: list[Tensor] = []  # [N, S] each

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer, if it counts."""
        if layer.number in self.layers and not run.finished:
            with torch.no_grad():
                self.maps.append(self.map(layer))


class TeacherAttention(MapReading):
    """Queries of rows and the keys of some layers of a teacher, which stand for its maps."""

    def __init__(self, at: MapRows, layers: tuple[int, ...]) -> None:
        super().__init__(at, layers, "visible")
        self.found: dict[int, AttentionReference] = {}
        self.seen: dict[int, Window] = {}

    def rows_in(self, number: int) -> Rows | None:
        """The rows, in the layers that count."""
        return self.at.rows if number in self.layers else None

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Keep one layer, if it counts."""
        if layer.number in self.layers:
            options = self.options(layer)
            known = {name: options[name] for name in ("lse", "scale", "softcap")}
            q = layer.queries(self.at.rows)
            self.found[layer.number] = AttentionReference(q, layer.k, **known)
            self.seen[layer.number] = layer.window


def policy_reading(request: Request) -> AgainstReferences | None:
    """The reading of the `policy` term; None if the batch has no rows for it.

    Raises:
        ValueError: rows without references, or references of another number of layers.
    """
    how, batch = request.terms.policy, request.batch
    if how is None or batch.policy_position.shape[1] == 0:
        return None
    layers, reference = chosen_layers(request.model, how.layers), batch.policy_reference
    if reference.shape[2] == 0 and "policy" in request.records:
        return None  # the references are being made
    wanted = f"attention [B, Ro, {len(layers)}, S], of layers {layers}, for gk_policy_position"
    require(reference.shape[2] == len(layers), "gk_policy_reference", wanted, list(reference.shape))
    maps = dict(zip(layers, reference.flatten(0, 1).unbind(1), strict=True))
    at = rows_over_all(request, batch.policy_position, leave_out_self=how.leaves_out_self)
    return AgainstReferences(at, maps, how.divergence)


def recorded_policy(request: Request) -> RecordedPolicy | None:
    """The reading of `gk_record="policy"`, as the attached `policy` says or its defaults."""
    position = request.batch.policy_position
    if "policy" not in request.records or position.shape[1] == 0:
        return None
    how = request.attached.policy or AttentionPolicy()
    at = rows_over_all(request, position, leave_out_self=how.leaves_out_self)
    return RecordedPolicy(at, chosen_layers(request.model, how.layers))


def policy_maps(request: Request, recorded: RecordedPolicy | None) -> Tensor:
    """[B, Ro, M, S]: what `gk_record="policy"` returns."""
    position, length = request.batch.policy_position, request.input_ids.shape[1]
    if recorded is None:
        how = request.attached.policy or AttentionPolicy()
        layers = len(chosen_layers(request.model, how.layers))
        return request.denominators.new_zeros((*position.shape, layers, length))
    return torch.stack(recorded.maps, 1).view(*position.shape, -1, length)
