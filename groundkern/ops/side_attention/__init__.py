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
    out: Tensor  # [N, Hq, Dv] in q's dtype
    lse: Tensor  # [N, Hq] fp32, natural log
    # [N, Hq, Dv] in q's dtype, for a backward that sums out . dout: what out lost when it was
    # rounded. Without it p (dp - delta) does not cancel if one key takes all. Empty if not used.
    rest: Tensor


class Upstream(NamedTuple):
    out: Tensor  # [N, Hq, Dv]
    lse: Tensor  # [N, Hq]
