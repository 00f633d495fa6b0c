"""What tests read off a batch and its logits: the model's own inputs, rows, side against main."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def plain_inputs(batch: dict) -> dict:
    """The model's own inputs."""
    return {name: x for name, x in batch.items() if not name.startswith("gk_")}


def rows_of(x: Tensor, position: Tensor) -> Tensor:
    """[B, S, D] -> [B, R, D]; a padding row gets row 0."""
    return x[torch.arange(len(x))[:, None], position.clamp(min=0).long()]


class Moved(NamedTuple):
    """How far logits of the aligned rows are from the model's own, in units of its largest."""

    main: float  # the furthest main logit
    side: float  # the least that a row's side logits moved


@torch.no_grad()
def moved_logits(model: nn.Module, batch: dict) -> Moved:
    """Main and side logits of an attached model against its own forward without `gk_` tensors."""
    plain = model(**plain_inputs(batch)).logits
    ours = model(**batch, gk_record="logits")
    aligned = batch["gk_side_position"] >= 0
    rows, largest = rows_of(plain, batch["gk_side_position"]), plain.abs().max()
    main, side = (x - rows for x in (ours.main_logits, ours.side_logits))
    side = side[aligned].abs().amax(-1).min()
    return Moved(float(main.abs().max() / largest), float(side / largest))


def assert_side_is_main(output, batch: dict) -> None:
    """Side and main logits of the aligned rows are one distribution."""
    aligned = batch["gk_side_position"] >= 0
    logits = (output.main_logits, output.side_logits)
    main, side = (x[aligned].log_softmax(-1) for x in logits)
    assert float((main - side).abs().max()) < 1e-5 * float(output.main_logits.abs().max())
