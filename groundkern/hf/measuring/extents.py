"""The rectangle of each visual token, from the places of the numbers that go into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.geometry.views import Size
from groundkern.hf.measuring.owners import Owners
from groundkern.hf.measuring.places import Places

BORDER = 0.5  # pixels: the middle of no number is nearer to a side of the image
BLURRED = 2 / 3  # of what its numbers are spread over: a token is then wrong by half its size
RESAMPLED = 0.1  # of a resized pixel: filters are cut off at the sides of an image


class Table(NamedTuple):
    """Measured places of the visual tokens of one sample.

    Args:
        places: fp64 [C, 5], as `image_geometry` returns them.
        error: pixels by which an edge may be wrong.
    """

    places: Tensor
    error: float


class _Spread(NamedTuple):
    """How the numbers of each token lie along an axis: fp64 [C] each, in pixels."""

    middle: Tensor
    width: Tensor  # of a token that is evenly covered
    pitch: Tensor  # between neighbouring numbers; 0: all are in one place


def table_of(
    places: Mapping[str, Places],
    owners: Owners,
    sizes: Sequence[Size],
    runs: Sequence[int],
    error: float,
) -> Table:
    """The rectangle of each visual token.

    Args:
        places: of the numbers of each float tensor.
        owners: their tokens.
        sizes: (width, height) of each image, in pixels.
        runs: the number of the run of neighbouring visual tokens that each token is in.
        error: pixels by which a place may be wrong.

    Returns:
        The table; a token without a number of the picture has no place (-1).

    Raises:
        ValueError: tokens that share so much that they are blurred by half their size, or images
            that share a token.
    """
    image, x, y = (torch.cat([p.flatten() for p in part]) for part in zip(*places.values()))
    token, element = owners.token, owners.element
    number = _images(token, image[element].double(), owners.tokens)
    there = number >= 0
    axes = [_spread(token, at[element].double(), owners) for at in (x, y)]
    pitch = [torch.where(one.pitch > 0, one.pitch, two.pitch) for one, two in (axes, axes[::-1])]
    widths = [(axis.width.square() + p.square()).sqrt() for axis, p in zip(axes, pitch)]
    scale, blur = _sharing(owners, axes, widths, (x[element], y[element]))
    edges = []
    for axis, width, side in zip(axes, widths, zip(*sizes)):
        end = torch.tensor(side, dtype=torch.float64)[number.clamp_min(0).long()]
        low, high = axis.middle - scale * width / 2, axis.middle + scale * width / 2
        low = torch.where(low <= BORDER + error, 0.0, low)
        high = torch.where(high >= end - BORDER - error, end, high)
        edges.append((low / end, high / end))
    (x0, x1), (y0, y1) = edges
    table = torch.stack([number, x0, y0, x1, y1], 1)
    table[~there] = torch.tensor([0.0, -1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    table[:, 0] = torch.tensor(_all_numbered(number.tolist(), runs, len(sizes)))
    resampled = RESAMPLED * float(torch.stack(pitch)[:, there].amax())
    # tokens smaller than a pixel show the whole of an image's only pixel
    border = BORDER if min(map(min, sizes)) > 1 else 1.0
    return Table(table, error + max(border, resampled) + float(blur))


def _images(token: Tensor, image: Tensor, tokens: int) -> Tensor:
    """fp64 [C]: the image that each token shows; -1: none."""
    first = torch.full((tokens,), -1.0, dtype=torch.float64)
    last = first.scatter_reduce(0, token, image, "amax", include_self=False)
    first = first.scatter_reduce(0, token, image, "amin", include_self=False)
    good = torch.equal(first, last)
    require(good, "model", "visual tokens of one image each", "tokens that show several images")
    return first


def _all_numbered(numbers: list[float], runs: Sequence[int], images: int) -> list[float]:
    """The images of all tokens: one without a place (-1) belongs to that of its neighbours."""
    if images == 1:
        return [0.0] * len(numbers)
    before, after = _last_known(numbers, runs), _last_known(numbers[::-1], runs[::-1])[::-1]
    found = []
    for one, other, run in zip(before, after, runs):
        near = {image for image, known in (one, other) if known == run} or {one[0], other[0]}
        good = len(near - {-1.0}) == 1
        wanted = "images whose visual tokens have text between them"
        require(good, "processor", wanted, "a token without a place between two images")
        found.append(max(near))
    return found


def _last_known(numbers: list[float], runs: Sequence[int]) -> list[tuple[float, int]]:
    """The last image up to each token, and the run that it was in."""
    found, last = [], (-1.0, -1)
    for number, run in zip(numbers, runs):
        last = (number, run) if number >= 0 else last
        found.append(last)
    return found


def _summed(token: Tensor, values: Tensor, tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.float64).index_add_(0, token, values.double())


def _spread(token: Tensor, at: Tensor, owners: Owners) -> _Spread:
    """Numbers on a lattice of n columns: their variance over the square of their span tells n."""
    tokens = owners.tokens
    low = torch.full((tokens,), torch.inf, dtype=torch.float64)
    low = low.scatter_reduce(0, token, at, "amin")
    high = -torch.full_like(low, torch.inf).scatter_reduce(0, token, -at, "amin")
    span = (high - low).nan_to_num(0, 0, 0)

    def variance(weight: Tensor) -> tuple[Tensor, Tensor]:
        total = _summed(token, weight, tokens)
        middle = _summed(token, weight * at, tokens) / total
        return middle, _summed(token, weight * (at - middle[token]).square(), tokens) / total

    middle, even = variance(torch.ones_like(at))
    pitch = (span * (12 * even / span.square() - 1) / 2).nan_to_num(0, 0, 0).clamp_min(0)
    middle, weighted = variance(owners.share.double())
    return _Spread(middle, (12 * weighted).sqrt(), pitch)


def _sharing(
    owners: Owners, axes: list[_Spread], widths: list[Tensor], at: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """By what a token's rectangle is too large because its numbers are shared, and the blur.

    The shares of a number add up to 1, so those of a token add up to the numbers that it would have
    alone; its rectangle is made to hold as many.
    """
    tokens, token = owners.tokens, owners.token
    if bool((owners.share == 1).all()):
        return torch.ones(tokens, dtype=torch.float64), torch.zeros(())
    inside = torch.ones_like(token, dtype=torch.bool)
    for axis, width, place in zip(axes, widths, at):
        inside &= (place - axis.middle[token]).abs() <= width[token] / 2
    own = _summed(token, owners.share, tokens)
    scale = (own / _summed(token, inside.double(), tokens)).nan_to_num(1, 1, 1).clamp_max(1).sqrt()
    (there,) = own.nonzero(as_tuple=True)
    good = bool((scale[there] >= BLURRED).all())
    require(
        good, "model", "visual tokens that each show a place", "tokens blurred by half their size"
    )
    blur = torch.stack([(1 - scale) * width for width in widths])[:, there].amax()
    return scale, blur
