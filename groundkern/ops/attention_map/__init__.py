"""Attention maps, contributions and their KL: what `forward` and `backward` of each backend are
handed. The three are one op of several kinds."""

from typing import NamedTuple

from torch import Tensor

MAP = "map"  # (K2)
CONTRIBUTION = "contribution"  # (C1)
KL_MEAN = "kl_mean"  # (K3) of the head mean
KL_EACH = "kl_each"  # (K3) of each head


class Inputs(NamedTuple):
    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor | None  # [B, Hkv, S, Dv], of a contribution
    g: Tensor | None  # [N, Hq, Dv], of a contribution
    head_weight: Tensor | None  # fp32 [N, Hq], of a map or a KL
    target: Tensor | None  # [N, C], of a KL
    lse: Tensor | None  # fp32 [N, Hq], the normaliser of over="visible" if it is given


class Options(NamedTuple):
    kind: str
    over: str  # "visible" | "columns": what p is normalised over
    rectify: bool  # of a contribution
    scale: float
    softcap: float  # 0: off
    lse_grad: bool = False  # the given lse is an input of its own and takes the gradient


class Gradients(NamedTuple):
    """None for inputs that are absent."""

    dq: Tensor
    dk: Tensor
    dv: Tensor | None
    dg: Tensor | None
    dhead_weight: Tensor | None
    dlse: Tensor | None = None  # [N, Hq], if `lse_grad`


def like_gradients(inputs: Inputs, options: Options) -> tuple[Tensor | None, ...]:
    """What each of the `Gradients` has the shape and dtype of; None for those that are absent."""
    return (*inputs[:5], inputs.lse if options.lse_grad else None)


def output_shape(inputs: Inputs, columns: Tensor, options: Options) -> tuple[int, ...]:
    """[N, C], of a KL [N]."""
    rows = inputs.q.shape[0]
    return (rows,) if options.kind in (KL_MEAN, KL_EACH) else (rows, columns.shape[1])
