"""How much the text of a sample looks at each of its visual tokens, layer by layer (BASIC)."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import attention_map, checks
from groundkern.hf.data.image_token import one_of
from groundkern.hf.model.body_run import BodyRun
from groundkern.hf.model.layer import Layer
from groundkern.hf.model.request import Request, visual_tokens_of
from groundkern.hf.model.rows import Rows

BLOCK_ELEMENTS = 2**22  # of the maps that are held at once, in fp32


class PatchWeight:
    """A reading without a gradient: attention of the text tokens to each visual token, their mean
    over text tokens of the same sample, over heads and over the first layers.

    Rows are all text tokens of a sample, so maps are made a block of rows at a time and only their
    sum over rows is kept.

    Args:
        request: of a batch.
        depth: k of (B1): the layers that count.
    """

    uses_lse = alike = False

    def __init__(self, request: Request, depth: int) -> None:
        self.depth, self.columns = depth, request.batch.map_columns.int()  # [B, C]
        text, start = text_tokens(request), request.first_key.long()  # [B, S]
        counts = torch.zeros_like(start).scatter_add(1, start, text.long())  # of each document
        column = self.columns.clamp(min=0).long()
        self.texts = counts.gather(1, start.gather(1, column))  # [B, C], of a column's document
        self.blocks = [request.rows(each) for each in self._blocks(text)]
        self.total = torch.zeros(self.columns.shape, device=text.device)
        self.layers = 0

    def _blocks(self, text: Tensor) -> tuple[Tensor, ...]:
        """Positions of text tokens, padded with -1, [B, R] of each block."""
        if self.columns.numel() == 0:
            return ()
        number = text.sum(1, keepdim=True)
        most = text.shape[1]
        if checks.values_visible(number):
            most = int(number.max())
        order = text.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        place = torch.arange(most, device=text.device)
        position = torch.where(place < number, order, -1)
        return position.split(max(1, BLOCK_ELEMENTS // self.columns.numel()), 1)

    def rows_in(self, number: int) -> Rows | None:
        """None: it takes its rows itself, without a gradient."""

    def read(self, run: BodyRun, layer: Layer) -> None:
        """Add one layer, if it is one of the first."""
        if run.finished or layer.number >= self.depth:
            return
        with torch.no_grad():
            for rows in self.blocks:
                at = rows.at(layer.window)
                options = {**layer.options, "over": "visible", "lse": layer.normaliser(rows)}
                maps = attention_map(at.take(layer.q), layer.k, at, self.columns, **options)
                self.total += maps.unflatten(0, (len(self.total), rows.rows)).sum(1)
        self.layers += 1

    def mean(self) -> Tensor:
        """fp32 [B, C]: a_i of (B2)."""
        return self.total / (self.texts * max(1, self.layers)).clamp(min=1)


def text_tokens(request: Request) -> Tensor:
    """bool [B, S]: the tokens that are neither padding nor a part of an image or a video."""
    inputs, batch = request.inputs, request.batch
    visual = one_of(request.input_ids, visual_tokens_of(request.model)) | (batch.image >= 0)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:  # Molmo2's markers and line ends see later tokens too
            visual = visual | (inputs[name] == 1) | (inputs[name] == 2)
    mask = inputs.get("attention_mask")
    return ~visual if mask is None else ~visual & mask.bool()


def even_patches(image: Tensor) -> Tensor:
    """fp32 [B, C]: 1 over the visual tokens of each token's image; 0 for padding.

    Args:
        image: [B, C] the image of each visual token, -1 for padding.
    """
    ordered = image.sort(1).values.contiguous()
    image = image.contiguous()
    ends = (torch.searchsorted(ordered, image, right=right) for right in (True, False))
    stop, start = ends
    return torch.where(image >= 0, 1.0 / (stop - start).clamp(min=1), 0.0)
