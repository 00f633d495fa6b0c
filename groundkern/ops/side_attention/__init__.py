"""Side attention: what `forward` and `backward` of each backend are handed."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    lse: Tensor | None  # [N, Hq], of the main pass: a shift of the softmax, None in the backward


class Options(NamedTuple):
    scale: float
    softcap: float  # 0: off


class Outputs(NamedTuple):
    """Also their gradients."""

    out: Tensor  # [N, Hq, Dv] in q's dtype
    lse: Tensor  # [N, Hq] fp32, natural log
