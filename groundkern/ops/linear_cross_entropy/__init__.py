"""Linear cross entropy: what `forward`, `backward` and `forward_with_gradients` of each backend are
handed."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Labels(NamedTuple):
    """The labels of each row, and of its image."""

    target: Tensor  # int64 [N]
    ids: Tensor | None  # int64 [T], all bags one after the other
    offsets: Tensor | None  # int64 [G + 1]
    index: Tensor | None  # int64 [N] from row to bag, -1: none


class Options(NamedTuple):
    smoothing: float
    ignore_index: int
    softcap: float  # 0: off
    group: str  # name of the process group that shards the vocabulary, "": none


class Rows(NamedTuple):
    """Results of each row; of an ignored one 0, 0, 0 and -1."""

    loss: Tensor  # fp32 [N]
    log_prob: Tensor  # fp32 [N], of the target
    lse: Tensor  # fp32 [N]
    predicted: Tensor  # int64 [N], the likeliest id


class Upstream(NamedTuple):
    dloss: Tensor  # fp32 [N]
    dlog_prob: Tensor
    dlse: Tensor


class Head(NamedTuple):
    """How the backward treats the weight."""

    train_weight: bool
    weight_grad: Tensor | None  # fp32 [V, D], to add dweight to instead of returning it


class Ahead(NamedTuple):
    """What a forward that computes the gradients too must know of them."""

    row_factor: Tensor | None  # [N]: the loss is sum_n row_factor_n L_n; None: L [N]
    train_weight: bool


class Gradients(NamedTuple):
    """None for an absent bias, a frozen weight, and a gradient added to a buffer."""

    dhidden: Tensor  # [N, D]
    dweight: Tensor | None  # [V, D]
    dbias: Tensor | None  # [V]
