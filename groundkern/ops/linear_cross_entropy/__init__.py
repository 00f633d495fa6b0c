"""Linear cross entropy: what `forward`, `backward` and `forward_with_gradients` of each backend are
handed."""

from typing import NamedTuple

from torch import Tensor

from groundkern.head_gradients import Ahead as Ahead
from groundkern.head_gradients import Gradients as Gradients

MOST_TOP = 32  # of `Options.top_k`


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Labels(NamedTuple):
    """What each row's loss is made of: weights t_y >= 0 of labels y (see `reference`).

    A row's own label has a field of its own, because -log p of it must not cancel as p -> 1. A list
    of further labels belongs to an image (a bag, with `Options.smoothing`) or to a row (soft
    targets, without). Copies of the own label in it count for nothing.
    """

    target: Tensor  # int64 [N], the row's own label
    own: Tensor | None  # fp32 [N], what -log p of it counts for; None: 1
    ids: Tensor | None  # int64 [T], all lists one after the other
    weights: Tensor | None  # fp32 [T], what each counts for; None: 1
    offsets: Tensor | None  # int64 [G + 1]
    # also the name of a method of tuples, which nobody calls
    index: Tensor | None  # type: ignore[assignment]  # int64 [N] from row to list, -1: none
    class_weight: Tensor | None  # fp32 [whole V], for label_smoothing; None: 1


class Options(NamedTuple):
    """The form that api, op and backends share."""

    smoothing: float  # share of the own label's weight that a bag's others get, in even parts; 0:
    # a list's labels count for their weights alone, and the own label for its
    label_smoothing: float  # share spread over the whole vocabulary
    z_loss: float  # times lse^2
    softcap: float  # 0: off
    temperature: float
    ignore_index: int
    group: str  # name of the process group that shards the vocabulary, "": none
    entropy: bool  # whether `Rows.entropy` is wanted
    top_k: int  # how many of the likeliest labels are wanted, at most MOST_TOP


class Rows(NamedTuple):
    """Results of each row; of an ignored one 0, and -1 for ids."""

    loss: Tensor  # fp32 [N]
    log_prob: Tensor  # fp32 [N], of the target
    lse: Tensor  # fp32 [N]
    entropy: Tensor | None  # fp32 [N]
    predicted: Tensor  # int64 [N], the likeliest id
    top_ids: Tensor | None  # int64 [N, top_k], likeliest first; among equals the smallest id
    top_log_probs: Tensor | None  # fp32 [N, top_k]; -1 and -inf beyond the vocabulary


class Upstream(NamedTuple):
    dloss: Tensor  # fp32 [N]
    dlog_prob: Tensor
    dlse: Tensor
    dentropy: Tensor | None  # None without `Options.entropy`


class Head(NamedTuple):
    """How the backward treats the weight."""

    train_weight: bool
    weight_grad: Tensor | None  # fp32 [V, D], to add dweight to instead of returning it
