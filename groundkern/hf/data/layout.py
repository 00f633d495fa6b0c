"""From one example to rows of token positions: what is trained, SMAM's side rows, KLAL's map rows.

Truncation is decided here too, since all of it counts tokens: visual tokens and the special tokens
that wrap them stay, text goes from the end, and supervision that loses its tokens is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from groundkern import maps
from groundkern.checks import require
from groundkern.hf.data.example import GroundedExample, Phrase, Region, message_text
from groundkern.hf.data.spans import Chat, TokenSpans


@dataclass
class Layout:
    """One sequence after truncation.

    Args:
        example: what it was made of.
        chat: its rendered text.
        spans: finds the tokens (before truncation) of characters.
        kept: the tokens that stay, ascending positions before truncation.
        ids: the token ids that stay.
        special: ids of special tokens.
        visual: int64 [n] positions of the visual tokens.
        table: fp64 [n, 5] of `image_geometry`.
    """

    example: GroundedExample
    chat: Chat
    spans: TokenSpans
    kept: list[int]
    ids: list[int]
    special: frozenset[int]
    visual: Tensor
    table: Tensor
    _position: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._position = {before: now for now, before in enumerate(self.kept)}

    def positions(self, start: int, stop: int) -> list[int | None]:
        """Tokens on characters `start:stop` of the rendered chat; None for one that was cut off."""
        return [self._position.get(token) for token in self.spans.tokens(start, stop)]

    def region_positions(self, region: Region | Phrase) -> list[int | None]:
        """Tokens of the region's or phrase's text, white space at its ends left out."""
        text = message_text(self.example.messages[region.turn])[region.start : region.stop]
        start = region.start + len(text) - len(text.lstrip())
        found = self.chat.turns[region.turn].find(start, start + len(text.strip()))
        return [p for span in found for p in self.positions(*span)]


@dataclass
class SideRows:
    """SMAM: `position[k]` predicts an aligned token, whose regions hold `inside[set[k]]`."""

    position: list[int] = field(default_factory=list)
    set: list[int] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)  # bool [n] over the visual tokens


@dataclass
class MapRows:
    """KLAL: the row at `position[k]` should look at image `image[k]` as `target[k]` says."""

    position: list[int] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    target: list[Tensor] = field(default_factory=list)  # int32 [n], fixed point


def kept_tokens(
    ids: list[int],
    images: list[range],
    special: frozenset[int],
    max_length: int | None,
    name: str,
) -> list[int]:
    """Positions that survive truncation: images and the special tokens beside them, then text from
    the start.

    Args:
        ids: the sequence.
        images: the tokens of each image, with what stands between its tiles (`TokenSpans.images`).
        special: ids of special tokens.
        max_length: tokens at most; None: no limit.
        name: the sample's, for errors.

    Raises:
        ValueError: the images alone are longer than `max_length`.
    """
    if max_length is None or len(ids) <= max_length:
        return list(range(len(ids)))
    stays = {token for image in images for token in image}
    beside = {token for image in images for token in (image.start - 1, image.stop)}
    stays |= {token for token in beside if 0 <= token < len(ids) and ids[token] in special}
    room = max_length - len(stays)
    require(room >= 0, f"{name}: max_length", f"at least {len(stays)}, for its images", max_length)
    text = [token for token in range(len(ids)) if token not in stays]
    return sorted([*stays, *text[:room]])


def trained_positions(layout: Layout) -> list[int]:
    """Positions of the tokens to learn: every assistant text, and what closes its turn.

    What the template puts behind the text is learned up to its first special token; a template that
    closes a turn without one (the hub's LLaVA-1.5) teaches no stopping.
    """
    trained: set[int] = set()
    for turn in layout.chat.turns.values():
        body = layout.positions(turn.pieces[0].at, turn.tail[0])
        trained.update(p for p in body if p is not None)
        closing: list[int] = []
        for p in layout.positions(*turn.tail):
            if p is None:
                break
            closing.append(p)
            if layout.ids[p] in layout.special:
                trained.update(closing)
                break
    return sorted(trained)


def region_masks(layout: Layout, counts: Counter) -> list[Tensor]:
    """For each region, which visual tokens it covers: bool [n]."""
    masks = []
    for region in layout.example.regions:
        own = layout.table[:, 0] == region.image
        mask = torch.zeros(len(layout.visual), dtype=torch.bool)
        mask[own] = maps.inside(layout.table[own, 1:], **_shapes([region]))
        counts["regions"] += 1
        counts["regions_outside"] += not mask.any()
        masks.append(mask)
    return masks


EMPTY_REGION = ("skip", "language")
MAP_ROWS = ("last", "predictor", "answer", "phrase")


def side_rows(
    layout: Layout, masks: list[Tensor], counts: Counter, empty: str = "skip"
) -> SideRows:
    """A row `i - 1` for each token `i` on a region's text; a token of several sees their union.

    A token whose regions hold no visual token before it is left out, or (`empty="language"`) sees
    the language tokens alone.
    """
    aligned: dict[int, dict[int, None]] = {}
    for index, region in enumerate(layout.example.regions):
        positions = layout.region_positions(region)
        counts["regions_truncated"] += None in positions
        for p in positions:
            if p is not None:
                aligned.setdefault(p, {})[index] = None
    visual = set(layout.visual.tolist())
    rows, numbers = SideRows(), {}
    for token, regions in sorted(aligned.items()):
        row = token - 1
        union = torch.stack([masks[index] for index in regions]).any(0)
        without = not (union & (layout.visual <= row)).any()
        counts["side_rows_without_region"] += without
        if row in visual:
            counts["side_rows_on_image"] += not without
        elif not without or empty == "language":
            number = numbers.setdefault(tuple(regions), len(numbers))
            if number == len(rows.inside):
                rows.inside.append(union)
            rows.position.append(row)
            rows.set.append(number)
    counts["side_rows"] += len(rows.position)
    return rows


def map_rows(
    layout: Layout,
    kind: str,
    levels: tuple[float, float, float],
    counts: Counter,
    which: str = "last",
) -> MapRows:
    """Rows for each answer and image that regions connect, each with a target over the image.

    `which`: the answer's "last" content token (its own row), the row that predicts it
    ("predictor"), every token of the "answer", or every token of a region's text ("phrase"), which
    has that region's target alone.
    """
    connected: dict[tuple[int, int], list[Region]] = {}
    for region in layout.example.regions:
        connected.setdefault((region.turn, region.image), []).append(region)
    rows = MapRows()
    for (turn, image), regions in sorted(connected.items(), key=lambda item: item[0]):
        for position, told in _map_positions(layout, turn, regions, which):
            if position is None:
                counts["map_rows_truncated"] += 1
                continue
            own = (layout.table[:, 0] == image) & (layout.visual <= position)
            shapes = _shapes(told)
            target = maps.target_map(layout.table[own, 1:], kind=kind, levels=levels, **shapes)
            if not target.any():
                counts["map_rows_without_target"] += 1
                continue
            full = torch.zeros(len(layout.visual))
            full[own] = target
            rows.position.append(position)
            rows.image.append(image)
            rows.target.append(maps.quantise(full))
    counts["map_rows"] += len(rows.position)
    return rows


def _map_positions(
    layout: Layout, turn: int, regions: list[Region], which: str
) -> list[tuple[int | None, list[Region]]]:
    """The rows of one answer and the regions that each looks at; None: cut off."""
    if which == "phrase":
        told: dict[int | None, list[Region]] = {}
        for region in regions:
            for position in layout.region_positions(region):
                told.setdefault(position, []).append(region)
        return sorted(told.items(), key=lambda item: (item[0] is None, item[0]))
    start, end = layout.chat.turns[turn].pieces[0].at, layout.chat.turns[turn].tail[0]
    if which == "answer":
        return [(position, regions) for position in layout.positions(start, end)]
    last = layout.positions(end - 1, end)[-1]
    return [(last - 1 if which == "predictor" and last is not None else last, regions)]


def _shapes(regions: list[Region]) -> dict[str, list]:
    return {
        kind: [shape for region in regions for shape in getattr(region, kind)]
        for kind in ("boxes", "points", "polygons", "polylines")
    }
