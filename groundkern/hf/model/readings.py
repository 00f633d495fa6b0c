"""What a forward reads in its attention layers, for its terms and recordings."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from groundkern.hf.model.attribution import SavedAttention
from groundkern.hf.model.basic import basic_depth
from groundkern.hf.model.body_run import Reading
from groundkern.hf.model.columns import SplitColumns
from groundkern.hf.model.gradcam import SavedLayers, gradcam_terms
from groundkern.hf.model.head_weight import head_weight_of
from groundkern.hf.model.map_readings import (
    MapLoss,
    MapReading,
    MapRows,
    MapSum,
    PickedSum,
    RecordedHeads,
    RecordedMaps,
)
from groundkern.hf.model.patch_weight import PatchWeight
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import map_sets


@dataclass
class Readings:
    """The readings of one forward; None if no term or no row uses one."""

    kl: MapLoss | None = None
    kl_map: MapSum | None = None
    queries: Reading | None = None  # of GUI-AIMA's head weights
    margin_map: MapSum | None = None
    phrase_map: MapSum | None = None
    recorded: RecordedMaps | None = None
    recorded_heads: RecordedHeads | None = None
    saved: SavedAttention | None = None
    explained: SavedLayers | None = None
    patches: PatchWeight | None = None
    policy: MapReading | None = None
    distilled: MapReading | None = None
    recorded_policy: MapReading | None = None

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
            heads, layers = klal.heads_by_layer, klal.counted_layers
            if klal.by_queries:
                pass  # `sink_heads` adds what it reads
            elif klal.picked_heads is not None:
                found.kl_map = PickedSum(at, layers, klal.over, klal.picked_heads)
            elif klal.average_layers:
                found.kl_map = MapSum(at, layers, klal.over, weight, heads)
            else:
                found.kl = MapLoss(at, map_target(request), klal, weight)
        if margins is not None and margins.maps == "attention":
            found.margin_map = MapSum(at, margins.layers, "columns")
        if "maps" in request.records:
            over = "visible" if "visible" in request.records else "columns"
            found.recorded = RecordedMaps(at, over)
        if "heads" in request.records:
            found.recorded_heads = RecordedHeads(at)
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
