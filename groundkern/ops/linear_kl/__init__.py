"""Linear KL: what `forward`, `backward` and `forward_with_gradients` of each backend are handed."""

from typing import NamedTuple

from torch import Tensor

from groundkern.head_gradients import Ahead as Ahead
from groundkern.head_gradients import Gradients as Gradients


class Inputs(NamedTuple):
    """The student's head and the teacher's, which gets no gradient; their dtypes may differ."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    teacher_hidden: Tensor  # [N, Dt]
    teacher_weight: Tensor  # [V, Dt]
    teacher_bias: Tensor | None  # [V]


class Rows(NamedTuple):
    counted: Tensor | None  # bool [N]; None: all


class Options(NamedTuple):
    kind: str  # "forward", "reverse" or "js"
    beta: float  # the teacher's share of the mixture of "js"
    temperature: float
    softcap: float  # 0: off
    teacher_softcap: float  # 0: off
    group: str  # name of the process group that shards the vocabulary, "": none


class Upstream(NamedTuple):
    dloss: Tensor  # fp32 [N]
