"""Visual tokens that draw attention whatever is asked, kept in every set of SMAM (S6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundkern import attention_map
from groundkern.checks import require, values_visible
from groundkern.hf.data.batch import GroundedBatch
from groundkern.hf.model.layer import Layer, SideRows
from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import side_sets
from groundkern.hf.objectives import Smam
from groundkern.selection import KeySets


def sink_layer(model: nn.Module, smam: Smam) -> int:
    """The layer that shows the sinks: `smam.sink_layer`, or the first of softmax attention behind.

    Args:
        model: a transformers model without wrappers.
        smam: with sinks.
    """
    return next(number for number in text_attention(model) if number >= smam.sink_layer)


class SinkSideRows(SideRows):
    """Aligned rows whose sets have each image's sinks, from one layer on.

    They are chosen once a forward, in that layer, without a gradient. A layer that checkpointing
    recomputes takes those of the first time.

    Args:
        request: with side tokens and `keep: sinks`, of whole sequences.

    Raises:
        ValueError: (checked if that needs no sync) visual tokens and no `gk_map_columns`.
    """

    alike = False

    def __init__(self, request: Request) -> None:
        batch, smam = request.batch, request.terms.smam
        super().__init__(request.rows(batch.side_position), side_sets(batch))
        if batch.map_columns.shape[1] == 0 and values_visible(batch.image):
            none = not bool((batch.image >= 0).any())
            require(none, "gk_map_columns", "every visual token, with smam.keep sinks", "none")
        self.batch, self.count = batch, smam.keep_sinks
        self.first = sink_layer(request.model, smam)
        self.text = request.rows(batch.text_position)
        self._with_sinks: KeySets | None = None

    def allowed_in(self, layer: Layer) -> KeySets:
        """The sets of a layer."""
        if layer.number < self.first or self.batch.map_columns.shape[1] == 0:
            return self.allowed
        if self._with_sinks is None:
            with torch.no_grad():
                self._with_sinks = side_sets(self.batch, kept=self._sinks(layer))
        return self._with_sinks

    def _sinks(self, layer: Layer) -> Tensor:
        """bool [B, S]: the sinks of all images."""
        rows, columns = self.text, self.batch.map_columns
        maps = attention_map(
            layer.queries(rows),
            layer.k,
            rows.at(layer.window),
            columns.int(),
            **layer.options,
            over="visible",
            lse=layer.normaliser(rows),
        )  # [B * Rt, C]
        total = maps.view(len(columns), -1, columns.shape[1]).sum(1)
        return most_attended(self.batch, total, self.count)


def most_attended(batch: GroundedBatch, attention: Tensor, count: int) -> Tensor:
    """The visual tokens of each image with the most attention.

    Args:
        batch: the batch.
        attention: [B, C] on its map columns.
        count: of each image at most; those with no attention at all are none.

    Returns:
        bool [B, S]. Of equals the first ones.

    Source: (S6).
    """
    columns = batch.map_columns.clamp(min=0).long()
    image = batch.image.gather(1, columns).masked_fill(batch.map_columns < 0, -1)
    order = attention.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, image.gather(1, order).argsort(dim=1, stable=True))  # by image, then
    sorted_image = image.gather(1, order).contiguous()
    rank = torch.arange(order.shape[1], device=order.device)
    rank = rank - torch.searchsorted(sorted_image, sorted_image)
    chosen = (rank < count) & (sorted_image >= 0) & (attention.gather(1, order) > 0)
    found = torch.zeros_like(batch.image, dtype=torch.int32)
    found.scatter_reduce_(1, columns.gather(1, order), chosen.int(), "amax")
    return found > 0
