"""An op to copy: y = factor x, row by row. What `forward` and `backward` of each backend are
handed."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    x: Tensor  # [N, D]
    factor: Tensor  # fp32 [N]


class Options(NamedTuple):
    scale: float


class Upstream(NamedTuple):
    dy: Tensor  # [N, D]


class Gradients(NamedTuple):
    dx: Tensor  # [N, D]
    dfactor: Tensor  # fp32 [N]
