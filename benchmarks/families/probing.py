"""Where visual tokens are, by a slow probe that knows nothing of a model: edges step over an image.

An image is black up to a column and white from there on. While the column steps from the left to
the right, a visual token changes from the first step that its place begins at to the last one. The
same along y. `python -m benchmarks.families.probing` compares the families' tables and the measured
geometry with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Family, Unavailable
from groundkern.hf import MeasuredGeometry, image_geometry
from groundkern.hf.data.calling import sample
from groundkern.hf.data.geometry import FAMILIES

Size = tuple[int, int]
SIZES = ((150, 97), (61, 170))
STILL = 0.02  # of a token's change from white to black: what counts as none


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
        model: without wrappers.
        processor: the model's.
        size: (width, height) of the image, in pixels.
        step: of the edges, in pixels.

    Returns:
        fp64 [C, 4] in pixels; -1 for a token that never changes. An edge is wrong by up to a step
        and what resizing blurs.
    """
    axes = []
    with without_attention(model), torch.no_grad():
        for axis in (0, 1):
            at = [*range(0, size[axis], step), size[axis]]
            tokens = torch.stack(
                [tokens_of(model, processor, _edge(size, axis, where)) for where in at]
            )  # [steps, C, D]
            axes.append(_extent(tokens.float(), torch.tensor(at).double()))
    (x0, x1), (y0, y1) = axes
    rects = torch.stack([x0, y0, x1, y1], 1)
    return torch.where((rects < 0).any(1, keepdim=True), -1.0, rects)


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
    """White, and black up to a column (axis 0) or row (axis 1)."""
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, where, size[1]) if axis == 0 else (0, 0, size[0], where))
    return image


@contextmanager
def without_attention(model: nn.Module) -> Iterator[None]:
    """What is named attention outside of the decoder adds nothing within the block."""

    def nothing(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    decoder = set(model.get_decoder().modules())
    with ExitStack() as stack:
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if "att" in last.lower() and "norm" not in last and module not in decoder:
                stack.callback(module.register_forward_hook(nothing).remove)
        yield


def tokens_of(model: nn.Module, processor: Any, image: Image.Image) -> Tensor:
    """[C, D]: what the decoder gets in the place of an image."""
    batch = sample(processor, [image])
    seen = []

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    try:
        model(**batch)
    finally:
        hook.remove()
    return seen[0][batch["input_ids"] == model.config.image_token_id]


def compare(name: str, family: Family, size: Size, step: int) -> list[str]:
    """Rows of the report: the table and the measured geometry against the probe, and each other."""
    model, processor = family.model(), family.processor()
    start = time.perf_counter()
    (measured,) = MeasuredGeometry(model, processor).measure([[size]])
    middle = time.perf_counter()
    probe = probed(model, processor, size, step=step)
    seconds = (middle - start, time.perf_counter() - middle)
    pairs = {"measured - probe": (in_pixels(measured.places, size), probe)}
    if model.config.model_type in FAMILIES:
        image = Image.new("RGB", size)
        batch = sample(processor, [image])
        (table,) = image_geometry(processor, model.config, [[image]], batch)
        table = in_pixels(table, size)
        pairs["table - probe"] = (table, probe)
        pairs["table - measured"] = (table, pairs["measured - probe"][0])
    rows = []
    for title, pair in pairs.items():
        found = agreement(*pair)
        rows.append(
            f"{name:18}{size[0]:5} x {size[1]:<5}{title:18}{found.placed:4} of {found.tokens:<4}"
            f"{found.worst:7.2f}{found.mean:7.2f}{found.overlap:7.3f}"
        )
    rows[0] += f"   +- {measured.error:.2f} px; {seconds[0]:.2f} s, probe {seconds[1]:.2f} s"
    return rows


def main(names: list[str], step: int = 2) -> None:
    """Print the comparison of families, all that can be built unless some are named."""
    print(f"{'family':18}{'size':13}{'':18}{'placed':12}{'worst':>7}{'mean':>7}{'IoU':>7}")
    for name in names or sorted(families()):
        for size in SIZES:
            try:
                family = families()[name]
                print("\n".join(compare(name, family, size, step)), flush=True)
            except (Unavailable, ValueError) as error:
                print(f"{name:18}{size[0]:5} x {size[1]:<5}{error}")


if __name__ == "__main__":
    main(sys.argv[1:])
