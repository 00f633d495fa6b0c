"""Where visual tokens are, by a slow probe that knows nothing of a model: edges step over an image.

An image is red up to a column and cyan from there on (some models norm a patch's numbers, which
makes black and white the same). While the column steps from the left to the right, a visual token
changes from the first step that its place begins at to the last one. The same along y.
`python -m benchmarks.families.probing` compares the families' tables and the measured geometry with
it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.families.seeing import (
    process,
    visual_tokens,
    without_attention,
    without_neighbours,
)
from benchmarks.families.table import made_with
from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Family
from groundkern.hf import MeasuredGeometry, image_geometry
from groundkern.hf.data.geometry import FAMILIES

Size = tuple[int, int]
SIZES = ((150, 97), (61, 170))
STILL = 0.02  # of a token's change from one colour to the other: what counts as none
BLUR = 1.0  # pixels that resizing mixes, where no measured geometry says how many
COLUMNS = ("type", "size", "places", "tokens", "agree %", "mean", "worst", "bar", "good")
TOGETHER = 16  # images in a call of the model


class Agreement(NamedTuple):
    """Two geometries of one image compared, in pixels.

    Args:
        tokens: how many there are.
        placed: how many have a place in both, or in neither.
        worst, mean: difference of edges of tokens that have a place in both.
        overlap: the mean intersection over union of their rectangles.
    """

    tokens: int
    placed: int
    worst: float
    mean: float
    overlap: float


def in_pixels(table: Tensor, size: Size) -> Tensor:
    """A table of `image_geometry` as fp64 [C, 4], cut at the image's sides; -1: off it."""
    rects = table[:, 1:].clamp(0, 1) * torch.tensor([*size, *size])
    empty = ((rects[:, 2:] - rects[:, :2]) < 1e-6).any(1)
    return torch.where(empty[:, None], -1.0, rects)


def agreement(one: Tensor, other: Tensor) -> Agreement:
    """Compare rectangles of the same tokens, both as `in_pixels` returns them."""
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} visual tokens against {len(other)}")
    both = (one[:, 0] >= 0) & (other[:, 0] >= 0)
    same = int(((one[:, 0] >= 0) == (other[:, 0] >= 0)).sum())
    if not bool(both.any()):
        return Agreement(len(one), same, 0.0, 0.0, 1.0)
    one, other = one[both], other[both]
    apart = (one - other).abs()
    common = torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])
    common = common.clamp_min(0).prod(1)
    areas = [(rects[:, 2:] - rects[:, :2]).prod(1) for rects in (one, other)]
    overlap = (common / (areas[0] + areas[1] - common)).mean()
    return Agreement(len(both), same, float(apart.amax()), float(apart.mean()), float(overlap))


def probed(model: nn.Module, processor: Any, size: Size, *, step: int) -> Tensor:
    """The rectangle of each visual token of an image, by edges that step over it.

    Args:
        model: without wrappers; it loses what mixes places (`seeing`).
        processor: the model's.
        size: (width, height) of the image, in pixels.
        step: of the edges, in pixels.

    Returns:
        fp64 [C, 4] in pixels; -1 for a token that never changes. An edge is wrong by up to a step
        and what resizing blurs.
    """
    without_neighbours(without_attention(model))
    axes = []
    for axis in (0, 1):
        at = [*range(0, size[axis], step), size[axis]]
        edges = [_edge(size, axis, where) for where in at]
        parts = [edges[i : i + TOGETHER] for i in range(0, len(edges), TOGETHER)]
        tokens = torch.cat([_tokens(model, process(processor, part)) for part in parts])
        axes.append(_extent(tokens.float(), torch.tensor(at).double()))
    (x0, x1), (y0, y1) = axes
    rects = torch.stack([x0, y0, x1, y1], 1)
    return torch.where((rects < 0).any(1, keepdim=True), -1.0, rects)


def _tokens(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """[B, C, D]: the visual tokens; of images that become codes of a vocabulary what they are from.

    Codes change at once, however little their place does.
    """
    if not hasattr(model.base_model, "vocabulary_mapping"):
        return visual_tokens(model, batch)
    seen: list[Tensor] = []
    quantize = model.base_model.vqmodel.quantize
    hook = quantize.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = visual_tokens(model, batch)
    hook.remove()
    features = torch.cat(seen).movedim(-3, -1)  # [B, ..., h, w, D]
    ends = tokens.shape[1] // features.shape[-3] - features.shape[-2]  # tokens at the end of a row
    padded = nn.functional.pad(features, (0, 0, 0, ends))
    return padded.reshape(*tokens.shape[:2], -1)


def _extent(tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token begins and ends to change, from its values [steps, C, D] at the edges."""
    before, after = (tokens - tokens[0]).norm(dim=-1), (tokens - tokens[-1]).norm(dim=-1)
    change = before.amax(0)
    steps = torch.arange(len(at))[:, None]
    first = torch.where(before <= STILL * change, steps, -1).amax(0)  # the last that is as at first
    last = torch.where(after <= STILL * change, steps, len(at)).amin(0)
    low = (at[first] + at[(first + 1).clamp_max(len(at) - 1)]) / 2
    high = (at[last] + at[(last - 1).clamp_min(0)]) / 2
    low = torch.where(first == 0, 0.0, low)
    high = torch.where(last == len(at) - 1, at[-1], high)
    nowhere = change <= 1e-5 * tokens.norm(dim=-1).amax()
    return torch.where(nowhere, -1.0, low), torch.where(nowhere, -1.0, high)


def _edge(size: Size, axis: int, where: int) -> Image.Image:
    """Cyan, and red up to a column (axis 0) or row (axis 1)."""
    image = Image.new("RGB", size, "cyan")
    image.paste("red", (0, 0, where, size[1]) if axis == 0 else (0, 0, size[0], where))
    return image


class Probed(NamedTuple):
    """What the table or the measured geometry of a family is, beside the probe.

    Args:
        kind: "table" or "measured".
        found: the comparison with the probe.
        bar: pixels by which an edge of the two may differ.
    """

    kind: str
    found: Agreement
    bar: float

    def cells(self) -> list[str]:
        """In the order of COLUMNS, from the third on."""
        found = self.found
        same = found.placed == found.tokens
        share = f"{100 * found.placed / max(found.tokens, 1):.4g}"
        edges = [f"{found.mean:.2f}", f"{found.worst:.2f}", f"{self.bar:.2f}"]
        good = "yes" if same and found.worst <= self.bar else "no"
        return [self.kind, str(found.tokens), share, *edges, good]


def compare(family: Family, size: Size, step: int) -> list[Probed]:
    """The table and the measured geometry of a family, each against the probe.

    Raises:
        Exception: a family that has neither; the reason.
    """
    model, processor = family.model(), family.processor()
    known = model.config.model_type in FAMILIES
    places, error = {}, BLUR
    if known:
        image = Image.new("RGB", size)
        batch = process(processor, [image])
        (places["table"],) = image_geometry(processor, model.config, [[image]], batch)
    try:
        (measured,) = MeasuredGeometry(model, processor).measure([[size]])
        places["measured"], error = measured.places, measured.error
    except Exception:  # whatever a family's code raises: then there is its table, if it has one
        if not known:
            raise
    probe, bar = probed(model, processor, size, step=step), step / 2 + error
    return [
        Probed(kind, agreement(in_pixels(table, size), probe), bar)
        for kind, table in places.items()
    ]


def rows_of(names: Iterable[str], sizes: Sequence[Size], step: int) -> list[str]:
    """Compare families, print each and return the rows of a table in Markdown."""
    zoo, rows = families(), []
    for name, size in product(names, sizes):
        try:
            found = [result.cells() for result in compare(zoo[name], size, step)]
        except Exception as error:  # whatever a family's code raises is a finding
            found = [[str(error).split("\n")[0], *[""] * (len(COLUMNS) - 3)]]
        for cells in found:
            first = [f"`{name}`", f"{size[0]} x {size[1]}"]
            rows.append(f"| {' | '.join(first + cells)} |")
            print(rows[-1], flush=True)
    return rows


def _size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def main(words: list[str] | None = None) -> int:
    """Print the comparison of families, all that have a table unless some are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families.probing")
    parser.add_argument("types", nargs="*", help="families of the zoo (default: with a table)")
    parser.add_argument("--sizes", nargs="+", type=_size, default=SIZES, help="such as 150x97")
    parser.add_argument("--step", type=int, default=2, help="pixels between two edges")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    arguments = parser.parse_args(words)
    zoo = families()
    for name in arguments.types:
        if name not in zoo:
            parser.error(f"types: expected families of the zoo, got {name!r}")
    tabled = [name for name in zoo if name.partition(":")[0] in FAMILIES]
    rows = rows_of(sorted(arguments.types or tabled), arguments.sizes, arguments.step)
    if arguments.markdown is not None:
        given = sys.argv[1:] if words is None else words
        command = " ".join(["python -m benchmarks.families.probing", *given])
        head = ["# Places of visual tokens against a slow probe", "", made_with(command), ""]
        head += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        arguments.markdown.write_text("\n".join(head + rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
